"""NIfTI, preprocessing, data set layouts and the store of prepared volumes."""
