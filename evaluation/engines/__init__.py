"""The libraries that ask models questions, one file each: the only files that import them."""
