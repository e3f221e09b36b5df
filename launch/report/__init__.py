"""The report of a run: `write_report` makes one self-contained HTML file, `ledger_view` the table for the
terminal.

    write_report([Path("runs/motion_tsm")], Path("runs/motion_tsm/report.html"), clip_images=None)
    Console().print(ledger_view(read_ledger(Path("runs/motion_tsm"))))

Pictures are inline SVG drawn here, not by a plotting library: they take their colors from CSS, so one file
serves light and dark screens and paper, their text is text, and they stay small.
"""

from launch.report.contact_sheet import ClipImages
from launch.report.page import write_report
from launch.report.terminal import ledger_view

__all__ = ["ClipImages", "ledger_view", "write_report"]
