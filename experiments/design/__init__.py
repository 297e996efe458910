"""Read a sweep file and expand it to frozen runs, without torch."""
