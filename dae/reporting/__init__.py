"""Reports of a run: TensorBoard, console and plots."""
