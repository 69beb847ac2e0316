"""Outputs appear whole or not at all."""

import pytest

from ddpm_mlp_pipeline.files import move_into, whole_file, whole_folder


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".txt"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_file_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(path) as temporary:
        temporary.write_text("half" + (tmp_path / "nothing").read_text())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_folder_appears_whole_or_stays(tmp_path, exists, fails):
    path = tmp_path / "inside" / "folder"
    if exists:
        path.mkdir(parents=True)
        (path / "old").touch()
    try:
        with whole_folder(path) as temporary:
            (temporary / "new").touch()
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    found = sorted(file.relative_to(path.parent).as_posix() for file in path.parent.rglob("*"))
    assert found == (["folder", "folder/old"] if exists else []) if fails else found == ["folder", "folder/new"]


def test_a_folder_that_can_not_be_replaced_comes_back(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(OSError, match="folder"), whole_folder(path) as temporary:
        temporary.rmdir()  # so that it can't be renamed
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")] == ["folder", "folder/old"]


def test_errors_name_the_users_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(IsADirectoryError, match="folder"), whole_file(tmp_path):
        pass
    with pytest.raises(NotADirectoryError, match="file"), whole_folder(tmp_path / "file"):
        pass
    with pytest.raises(FileNotFoundError, match="nowhere"), whole_file(tmp_path / "nowhere" / "a.txt"):
        pass
    with pytest.raises(OSError, match=r"/proc/a\.txt"), whole_file("/proc/a.txt"):
        pass


def test_moving_into_a_folder_replaces_entries(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        (folder / "unet").mkdir(parents=True)
        (folder / "model_index.json").write_text(folder.name)
        (folder / "unet" / folder.name).touch()
    (target / "kept").touch()
    move_into(source, target)
    assert sorted(path.name for path in target.rglob("*")) == ["kept", "model_index.json", "source", "unet"]
    assert (target / "model_index.json").read_text() == "source"
