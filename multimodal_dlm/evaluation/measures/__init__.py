"""One file for each measure; a file here is found by itself."""
