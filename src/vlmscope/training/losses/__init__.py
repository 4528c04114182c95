"""Terms of the transcoders' loss beside the fraction of variance unexplained, one a file."""
