"""Readers of the converted files in the folder that the environment variable METAOPT_DATA names.

Only the experiments of this repository use these files. The library has readers of official formats.

* Trial tables: `from_pmlb_results`, `from_oboe`, `from_taskset`, `from_lcdb`, `from_hpobench_mlp`; and the published
  curves of HPO-B, `from_hpob_curves`.
* Classification tables: `from_data_folder`; regression tables: `regression_tables`. Records of users:
  `from_parkinsons`, `from_heart_disease`.
* Images: `from_image_sets`, and Omniglot's official split, `omniglot_split`.
"""

from ._folder import data_file
from ._images import IMAGE_SETS, from_image_sets, omniglot_split
from ._tables import from_data_folder, regression_tables
from ._trial_tables import (
    PublishedCurves,
    from_hpob_curves,
    from_hpobench_mlp,
    from_lcdb,
    from_oboe,
    from_pmlb_results,
    from_taskset,
)
from ._users import from_heart_disease, from_parkinsons

__all__ = [
    "IMAGE_SETS",
    "PublishedCurves",
    "data_file",
    "from_data_folder",
    "from_heart_disease",
    "from_hpob_curves",
    "from_hpobench_mlp",
    "from_image_sets",
    "from_lcdb",
    "from_oboe",
    "from_parkinsons",
    "from_pmlb_results",
    "from_taskset",
    "omniglot_split",
    "regression_tables",
]
