"""The documentation as a site: the pages of the repository, laid out, built and checked."""
