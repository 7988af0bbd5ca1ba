"""Ways in which samples are stored: each module reads one."""
