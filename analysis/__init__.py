"""Run logs to claims: the log itself, power laws, compute multipliers, tables and figures. No torch here."""
