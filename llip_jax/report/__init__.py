"""Pages about runs, made of their files alone: no model and no jax. Needs the extra ``report``."""

from llip_jax.report.comparison import write_comparison
from llip_jax.report.page import write_report

__all__ = ["write_comparison", "write_report"]
