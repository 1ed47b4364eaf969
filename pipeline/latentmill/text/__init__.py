"""Text for display: masking secrets, escaping control characters, tables for notebooks."""
