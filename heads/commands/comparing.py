"""compare: features -> how much of the responses each feature space explains, uniquely and with others."""

from typing import Any

from featcache.machine.progress import counted
from featcache.workdir import WORK
from heads.commands.options import DATA, Ceiling, Data, Subjects, Work, command, open_data, read
from heads.config import CompareConfig
from heads.recipes.jobs import Job, Outcome


@command(CompareConfig)
def compare(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    **options: Any,
) -> Job:
    """Compare feature spaces: what layers, backbones or added features explain alone, uniquely, and in common."""
    config = read(CompareConfig, options)

    def call() -> Outcome:
        dataset = open_data(data, noise_ceiling, work)
        from featcache.dataset.grouping import split_of
        from heads.compare.run import compare as compare_spaces
        from heads.report.compared import compared_table
        from heads.report.printing import print_table

        by = split_of(config.split, dataset.subjects, work)
        found = compare_spaces(dataset.select(subject), config, work, by)
        print_table(compared_table(found, config.per))
        n_subjects = counted(len(found.subjects), "subject")
        return Outcome(
            f"{len(found.bands)} bands; {n_subjects}, {len(found.new)} new, in {found.folder}",
            {
                "bands": found.made_of,
                "rows": [row.to_json() for row in found.rows],
                "folder": str(found.folder),
                "subjects": {name: str(path) for name, path in found.subjects.items()},
            },
        )

    return Job(config, call)
