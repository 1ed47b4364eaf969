"""`latentmill view`: a page over a store, from a server on this machine that only reads."""
