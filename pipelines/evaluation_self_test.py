"""`aldm evaluate --self-test`: what the scores themselves react to, measured on a store's volumes."""

from pathlib import Path

from aldm.errors import UserError
from aldm.evaluation_settings import PARQUET, SCORES_FILE, TABLES, EvaluationSettings
from aldm.files import atomic_folder
from aldm.words import counted

NOTE = """The store's own volumes with a known fault, scored against the unchanged ones: means over subjects and
modalities. In brackets: how far a score lies from that of the unchanged volumes, as a share of the largest such
distance in its column. A score with a small share hardly sees it. Sharpness below 1 is blur or less contrast."""


def run_self_test(settings: EvaluationSettings, out: Path, *, overwrite: bool, dry_run: bool) -> int:
    """Score corrupted volumes of a split, write the rows and the tables, and print these.

    Raises:
        UserError: no store, or no subject.
    """
    from aldm.data.store import VolumeStore
    from aldm.score_reactions import CORRUPTIONS, reaction_table, reactions
    from aldm.score_rows import write_csv, write_parquet

    store = VolumeStore.open(settings.store)
    subjects = store.subjects(settings.split)[: settings.max_subjects]
    if not subjects:
        raise UserError(
            f"the store {settings.store} has no subject in the split {settings.split}: give another --split"
        )
    if dry_run:
        volumes = counted(sum(len(record.modalities) for record in subjects), "volume")
        print(f"{volumes}, unchanged and with {len(CORRUPTIONS)} faults each")
        return 0
    with atomic_folder(out, overwrite, marker=SCORES_FILE) as folder:
        rows = reactions(store, subjects, seed=settings.seed)
        write_csv(folder / SCORES_FILE, rows)
        write_parquet(folder / PARQUET, rows)
        regions = dict.fromkeys(row.region for row in rows)
        tables = [f"## Region: {region}\n\n{reaction_table(rows, region)}" for region in regions]
        text = "\n\n".join([f"# What the scores react to: {settings.split} split of {store.path.name}", NOTE, *tables])
        (folder / TABLES).write_text(text + "\n")
    print("\n\n".join(tables))
    print(f"\nall rows: {out / SCORES_FILE}")
    return 0
