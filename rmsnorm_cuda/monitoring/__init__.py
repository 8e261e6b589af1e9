"""What the norms of a model see while it runs: figures, alarms, a report and a plot.

`exporters` hands them to Prometheus, OpenTelemetry, transformers' Trainer and Lightning.
"""

from . import exporters
from .report import Alarm, RMSNormAlarm, Thresholds, heat_map
from .signals import SIGNALS
from .watch import Monitor, monitor

__all__ = ["SIGNALS", "Alarm", "Monitor", "RMSNormAlarm", "Thresholds", "exporters", "heat_map"]
__all__ += ["monitor"]
