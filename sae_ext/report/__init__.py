"""The report of a campaign: one HTML page that opens from a folder, with no server and no network.

`build_report` turns a `ReportData` (plain tables and dicts) into file names and their bytes, to be
written side by side into any folder.
"""

from __future__ import annotations

from sae_ext.report.data import SCHEMAS, ReportData, campaign_facts, campaign_table
from sae_ext.report.page import build_report

__all__ = ["SCHEMAS", "ReportData", "build_report", "campaign_facts", "campaign_table"]
