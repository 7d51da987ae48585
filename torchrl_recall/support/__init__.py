"""Where the data are: supports that traces stay inside of, from neighbours or from cells."""

from torchrl_recall.support.cell_support import CellSupport
from torchrl_recall.support.data_support import DataSupport

__all__ = ["CellSupport", "DataSupport"]
