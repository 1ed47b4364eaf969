"""Text for people: secrets masked, control characters escaped, tables for notebooks."""
