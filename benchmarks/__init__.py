"""Commands that measure what the project claims; README.md says how to run and read them."""
