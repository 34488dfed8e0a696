"""The one hot operation: kernel-weighted sums over the rows of a bank.

Every step of a guided generation asks, for b queries and n stored rows of width d, how near the
rows are and where their weighted mean lies. It is attention whose keys and values are the same
rows, with d in the tens of thousands, so its cost is that of reading the bank:
[pull][sparke.ops.pull] reads each row from memory once, for both answers.
"""

from __future__ import annotations

from sparke.ops._pull import IMPLEMENTATIONS, log_sum, pull
from sparke.ops._rows import squared_norms

__all__ = ["IMPLEMENTATIONS", "log_sum", "pull", "squared_norms"]
