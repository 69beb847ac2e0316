"""Outputs appear whole or not at all, and replace only what they may replace."""

import errno
import os
from pathlib import Path

import pytest

from ddpm_mlp_pipeline.errors import OutputExistsError
from ddpm_mlp_pipeline.files import check_names, move_into, remove_partial, whole_file, whole_folder


def own(name):
    """Whether the names are those of a command that writes three files, one of them in a folder."""
    return name in ("new", "old", "inside/", "inside/old")


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path, overwrite=True) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".txt"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_file_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(path, overwrite=True) as temporary:
        temporary.write_text("half" + (tmp_path / "nothing").read_text())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "link", "link to nothing"])
def test_a_file_that_exists_is_refused_before_the_work(tmp_path, kind):
    path = tmp_path / "a.txt"
    if kind != "file":
        path.symlink_to(tmp_path / "b.txt")
    if kind != "link to nothing":
        path.write_text("old")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=r"a\.txt exists: pass --overwrite to replace it"), whole_file(path):
        pytest.fail("the work began")
    assert tree(tmp_path) == before
    with whole_file(path, overwrite=True) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    if kind == "link":
        assert (tmp_path / "b.txt").read_text() == "old"  # the link's target


def test_a_file_that_appears_during_the_work_stays(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(OutputExistsError, match="exists"), whole_file(path):
        path.write_text("somebody's")
    assert path.read_text() == "somebody's"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_folder_appears_whole_or_stays(tmp_path, exists, fails):
    path = tmp_path / "inside" / "folder"
    if exists:
        path.mkdir(parents=True)
        (path / "old").touch()
    try:
        with whole_folder(path, own, overwrite=True) as temporary:
            (temporary / "new").touch()
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    found = tree(path.parent)
    assert found == (["folder", "folder/old"] if exists else []) if fails else found == ["folder", "folder/new"]


def test_a_folder_that_can_not_be_replaced_comes_back(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(OSError, match="folder"), whole_folder(path, own, overwrite=True) as temporary:
        temporary.rmdir()  # makes renaming fail
    assert tree(tmp_path) == ["folder", "folder/old"]


def test_a_folder_that_is_not_empty_is_refused_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with (
        pytest.raises(OutputExistsError, match="folder exists and isn't empty: pass --overwrite"),
        whole_folder(tmp_path / "folder", own),
    ):
        pytest.fail("the work began")
    assert tree(tmp_path) == ["folder", "folder/old"]
    (tmp_path / "folder" / "old").unlink()
    with whole_folder(tmp_path / "folder", own) as temporary:
        (temporary / "new").touch()
    assert tree(tmp_path) == ["folder", "folder/new"]


def put_link(folder):
    (folder / "old").symlink_to(folder.parent / "somewhere")


@pytest.mark.parametrize(
    ("put", "named"),
    [
        (lambda folder: (folder / "notes.txt").touch(), "notes.txt"),
        (lambda folder: (folder / "notes").mkdir(), "notes/"),
        (lambda folder: (folder / "old").mkdir(), "old/"),  # a folder with a file's name
        (lambda folder: (folder / "inside").touch(), "inside"),  # a file with a folder's name
        (lambda folder: [(folder / "inside").mkdir(), (folder / "inside" / "notes").touch()], "inside/notes"),
        (put_link, "old"),
    ],
)
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_folder_with_somebodys_files_is_left_alone(tmp_path, put, named, when):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "new").write_text("somebody's")
    if when == "before":
        put(path)
    output = whole_folder(path, own, overwrite=True)

    def work():
        with output:
            assert when == "during"
            put(path)

    with pytest.raises(OutputExistsError, match=f"folder holds {named}, which .* left alone"):
        work()
    assert (path / "new").read_text() == "somebody's"
    assert os.path.lexists(path / named)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_appears_during_the_work_stays(tmp_path):
    with pytest.raises(OutputExistsError, match="is left alone"), whole_folder(tmp_path / "folder", own):
        (tmp_path / "folder" / "notes").mkdir(parents=True)
    assert tree(tmp_path) == ["folder", "folder/notes"]


def test_a_link_to_a_folder_stands_for_the_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with whole_folder(tmp_path / "link", own) as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert sorted(tree(tmp_path)) == ["folder", "folder/new", "link"]


@pytest.mark.parametrize("path", [".", "..", "/", "../current"])
def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch, path):
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    with pytest.raises(OSError, match="name a folder inside it"), whole_folder(path, own, overwrite=True):
        pytest.fail("the work began")


def test_errors_name_the_users_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(IsADirectoryError, match="folder"), whole_file(tmp_path):
        pass
    with pytest.raises(NotADirectoryError, match="file"), whole_folder(tmp_path / "file", own):
        pass
    with pytest.raises(FileNotFoundError, match="nowhere"), whole_file(tmp_path / "nowhere" / "a.txt"):
        pass
    with pytest.raises(OSError, match=r"/proc/a\.txt"), whole_file("/proc/a.txt"):
        pass


@pytest.mark.parametrize("whole", [whole_file, lambda path: whole_folder(path, own)])
def test_only_errors_of_writing_blame_the_output(tmp_path, whole):
    output, samples = tmp_path / "out", tmp_path / "samples.npy"
    for error, named in [
        (FileNotFoundError(errno.ENOENT, "No such file", str(samples)), samples),
        (PermissionError(errno.EACCES, "Permission denied", str(samples)), samples),
        (OSError(errno.ENOSPC, "No space left on device"), output),
    ]:
        with pytest.raises(OSError, match=error.strerror) as found, whole(output):
            raise error
        assert found.value.filename == str(named)
        assert found.value.strerror.startswith("can't be written: ") == (named == output)
    with pytest.raises(OSError, match="can't be written") as found, whole(output) as temporary:
        (temporary / "nowhere" / "a").touch()
    assert found.value.filename == str(output)
    with pytest.raises(OSError, match=r"^damaged$"), whole(output):
        raise OSError("damaged")  # as a library raises it for a file that it reads
    assert not tree(tmp_path)


def test_moving_into_a_folder_replaces_files_and_leaves_others(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        (folder / "unet").mkdir(parents=True)
        for name in ("model_index.json", "pipeline.py", "unet/config.json", f"unet/{folder.name}"):
            (folder / name).write_text(folder.name)
    (target / "kept").touch()
    moved = []
    replace = Path.replace

    def watched(path, to):
        moved.append(path.relative_to(source).as_posix())
        assert not (target / "model_index.json").exists()
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", watched)
    move_into(source, target, last="model_index.json")
    assert moved[-1] == "model_index.json"
    files = ["model_index.json", "pipeline.py", "unet/config.json", "unet/source", "unet/target"]
    assert tree(target) == ["kept", *files[:2], "unet", *files[2:]]
    assert [(target / name).read_text() for name in files] == ["source"] * 4 + ["target"]


def test_names_that_a_run_writes_are_refused(tmp_path):
    names = ["model_index.json", "unet"]
    check_names(tmp_path / "nowhere", names)
    (tmp_path / "unet").mkdir()
    (tmp_path / "notes.txt").touch()
    check_names(tmp_path, names)
    (tmp_path / "unet" / "config.json").touch()
    with pytest.raises(OutputExistsError, match="unet exists: pass --overwrite_output_dir to replace it"):
        check_names(tmp_path, names)
    check_names(tmp_path, names, overwrite=True)


@pytest.mark.parametrize("name", ["model_index.json", "unet"])
@pytest.mark.parametrize("is_link", [False, True])
def test_another_kind_of_entry_is_never_written_over(tmp_path, name, is_link):
    path = tmp_path / name
    if is_link:
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    elif path.suffix:
        path.mkdir()
    else:
        path.touch()
    with pytest.raises(OutputExistsError, match=f"{name} is not a .*: it is left alone"):
        check_names(tmp_path, [name], overwrite=True)


def test_what_killed_processes_leave_is_removed_from_one_folder_only(tmp_path):
    for folder in (tmp_path, tmp_path / "another"):
        (folder / ".partial-checkpoint-5").mkdir(parents=True)
        (folder / ".partial-1234-a.png").touch()
    remove_partial(tmp_path)
    assert tree(tmp_path) == ["another", "another/.partial-1234-a.png", "another/.partial-checkpoint-5"]
