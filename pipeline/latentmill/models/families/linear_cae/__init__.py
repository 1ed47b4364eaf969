"""The models of the package linear-cae."""
