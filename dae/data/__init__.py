"""Images: where they come from, the noise added to them, and the batches made of both."""
