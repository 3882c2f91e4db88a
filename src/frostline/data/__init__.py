"""DATA and what is named instead of a file: readers of images, arrays and batches."""
