"""One file or short folder for each family of autoencoders."""
