"""The report of a store as one page, and the style sheet that `view` shares."""
