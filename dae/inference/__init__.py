"""The use of trained models: denoising of users' own images, and export for other runtimes."""
