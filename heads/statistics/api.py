"""Scores of every vertex for a program, as a pandas DataFrame."""

from pathlib import Path
from typing import TYPE_CHECKING

from featcache.workdir import WORK, data_folder
from heads.config.statistics import ScoresConfig
from heads.statistics.run import score_models
from heads.statistics.table import frame_of

if TYPE_CHECKING:
    import pandas


def scores(
    work: Path | str = WORK,
    data: Path | str | None = None,
    noise_ceiling: Path | str | None = None,
    *,
    subjects: str = "all",
    models: str = "*",
    exclude: str = "",
    folds: bool = False,
    permutations: int = 0,
    against: str = "",
    fdr: str = "bh",
    seed: int = 0,
) -> "pandas.DataFrame":
    """Out-of-fold scores of every vertex by every model of a work folder, and by the last blend, as one long table.

    Parameters
    ----------
    data : folder of the dataset; None: the imported one, or else the challenge's tree
    noise_ceiling : folder of noise ceilings, as for `open_dataset`
    subjects : 'all', or numbers or names with commas between
    models, exclude : patterns of names of models; the blend is 'blend'
    folds : whether there is a row for the r of each fold too
    permutations : for p values; 0: none
    against : model that all others are compared with: a pattern of its name, or its six digits
    fdr : 'bh' (Benjamini-Hochberg) or 'by' (Benjamini-Yekutieli)

    Returns
    -------
    DataFrame with a row for each subject, surface, vertex, model and fold, and the columns

    - subject, surface, model, fold : categories; the fold is 'all' for the r over all images, else '0', '1', ...
    - vertex : number of the column of the responses
    - roi : category; a vertex of several ROIs has their names with + between: see `explode_rois`
    - r, noise_ceiling, accuracy : float32; accuracy in percent, NaN without a ceiling or with one of 0
    - p, q, p_family : with permutations, of r over all images; NaN in rows of folds
    - difference, difference_p, difference_q : with `against`, of r; NaN in rows of folds and of that model itself

    Raises ConfigError where pandas is missing, and StoreError or ConfigError where there is no such model.
    """
    from featcache.dataset.open import open_dataset, with_known_pictures

    work = Path(work)
    folder = data_folder(None if data is None else Path(data), work)
    dataset = with_known_pictures(open_dataset(folder, noise_ceiling), work, None)
    config = ScoresConfig(
        models=models,
        exclude=exclude,
        against=against,
        permutations=permutations,
        fdr=fdr,
        per_fold=folds,
        seed=seed,
    )
    return frame_of(score_models(dataset.select(subjects), config, work, intervals=False).vertices)
