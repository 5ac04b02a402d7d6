"""``path-attention doctor``: whether a machine, or a cluster, does what this library needs, before a long job."""

from path_attention.doctor.command import examine, examine_together

__all__ = ["examine", "examine_together"]
