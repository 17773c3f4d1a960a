from . import activations as activations
from . import demo as demo
from . import evaluation as evaluation
from . import formats as formats
from . import images as images
from . import kernels as kernels
from . import metrics as metrics
from . import models as models
from . import sae as sae
from . import steering as steering
from . import tasks as tasks
from .activations import extract as extract
from .evaluation import evaluate as evaluate
from .formats import load_sae as load_sae
from .images import open_images as open_images
from .models import VisionBridge as VisionBridge
from .models import load_model as load_model
from .models import wrap as wrap
from .report import report as report
from .sae import VisionMultiSAETrainingRunner as VisionMultiSAETrainingRunner
from .sae import VisionSAERunnerConfig as VisionSAERunnerConfig
from .sae import VisionSAETrainingRunner as VisionSAETrainingRunner
from .sae import train as train
from .sae import train_many as train_many
from .steering import Edit as Edit
from .tasks import find_latents as find_latents

__version__: str
