"""The model's rooms: loading and roles, the packed batch, the log-prob engine, the reference, and sampling."""
