"""Device mesh and logical-axis rules."""
