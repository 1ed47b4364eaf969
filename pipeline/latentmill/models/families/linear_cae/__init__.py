"""Lin-CAE: the models of the package `linear-cae`."""
