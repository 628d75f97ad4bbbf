"""The comparison methods, one file each."""
