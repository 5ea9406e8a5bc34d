"""All that is worth knowing on a machine with a GPU, measured by one command within a time limit."""
