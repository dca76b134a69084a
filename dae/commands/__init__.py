"""The commands of `dae`: each module parses its flags and calls the package. Scripts in experiments/ do the same."""
