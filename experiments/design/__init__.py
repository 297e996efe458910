"""From a sweep file to frozen runs, without torch."""
