"""What a user has as data and models, read into batches. Loads no framework."""
