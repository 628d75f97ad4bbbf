"""`aldm evaluate --self-test`: what the scores themselves react to, measured on a store's volumes."""

import argparse

from aldm.errors import UserError
from aldm.evaluation_files import PARQUET, SCORES_FILE, TABLES
from aldm.files import atomic_folder
from aldm.words import counted

NOTE = """The store's own volumes with a known fault, scored against the unchanged ones: means over subjects and
modalities. In brackets: how far a score lies from that of the unchanged volumes, as a share of the largest such
distance in its column. A score with a small share hardly sees it. Sharpness below 1 is blur or less contrast."""


def run_self_test(args: argparse.Namespace) -> int:
    """Score corrupted volumes of a split, write the rows and the tables, and print these.

    Raises:
        UserError: a flag that names a model, no store, or no subject.
    """
    from aldm.data.store import VolumeStore
    from aldm.score_reactions import CORRUPTIONS, reaction_table, reactions
    from aldm.score_rows import write_csv, write_parquet

    given = [
        name
        for name in ("model", "baseline", "champion", "source", "target", "segmenter", "group")
        if getattr(args, name)
    ]
    if given:
        raise UserError(f"--self-test measures the scores and no model: leave out --{', --'.join(given)}")
    store = VolumeStore.open(args.store)
    subjects = store.subjects(args.split)[: args.max_subjects]
    if not subjects:
        raise UserError(f"the store {args.store} has no subject in the split {args.split}: give another --split")
    if args.dry_run:
        volumes = counted(sum(len(record.modalities) for record in subjects), "volume")
        print(f"{volumes}, unchanged and with {len(CORRUPTIONS)} faults each")
        return 0
    with atomic_folder(args.out, args.overwrite, marker=SCORES_FILE) as folder:
        rows = reactions(store, subjects, seed=args.seed)
        write_csv(folder / SCORES_FILE, rows)
        write_parquet(folder / PARQUET, rows)
        regions = dict.fromkeys(row.region for row in rows)
        tables = [f"## Region: {region}\n\n{reaction_table(rows, region)}" for region in regions]
        text = "\n\n".join([f"# What the scores react to: {args.split} split of {store.path.name}", NOTE, *tables])
        (folder / TABLES).write_text(text + "\n")
    print("\n\n".join(tables))
    print(f"\nall rows: {args.out / SCORES_FILE}")
    return 0
