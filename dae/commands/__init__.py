"""The commands of `dae`: each module parses its flags and calls the package. Most scripts in experiments/ call them."""
