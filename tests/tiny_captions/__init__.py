"""A data set of TensorFlow Datasets, which wants a package for each."""
