"""Networks, and fused forms of their layers."""
