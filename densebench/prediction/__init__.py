"""What a step will need, found out without running it: peak memory, work, and the largest batch that fits.

In reading order: `hidden` (what operators allocate inside), `shapes` (a quick way around FakeTensorMode),
`trace` (one step on shapes without data), `networks` (any module as a workload), `batches` (the peak against the
batch), `prediction` (what is answered), `predictor` (the public function), `command` (the command's table).
"""

from densebench.prediction.networks import PredictionError
from densebench.prediction.prediction import Prediction
from densebench.prediction.predictor import predict_memory
from densebench.prediction.trace import StepTrace, trace_case, trace_step

__all__ = ["Prediction", "PredictionError", "StepTrace", "predict_memory", "trace_case", "trace_step"]
