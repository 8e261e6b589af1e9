"""What the norms of a model see while it runs: figures, alarms, a report and a plot."""

from .report import Alarm, RMSNormAlarm, Thresholds, heat_map
from .watch import Monitor, monitor

__all__ = ["Alarm", "Monitor", "RMSNormAlarm", "Thresholds", "heat_map", "monitor"]
