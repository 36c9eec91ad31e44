#!/usr/bin/env bash
# Fetches the landscape photos that colorize.py learns from into data/landscapes, beside this file.
#
#   ./download_landscapes.sh               all photos, about 4,000
#   ./download_landscapes.sh --remixable   only those whose license allows derivatives
#
# If it was cut off, call it again: it goes on. Of two calls at once, the second waits.
# data/landscapes may be a link to a folder on a larger disk, but not to the disk's topmost one.
#
# The photos are landscapes_small.zip of https://github.com/ml5js/ml5-data-and-models, collected
# from Flickr; each keeps its photographer's license. The data set's README asks those who do
# generative work to take out licenses 3 (CC BY-NC-ND) and 6 (CC BY-ND): --remixable does.
#
# LANDSCAPES_URL names another copy, with the records in licenses/ beside it, of the git blob id
# LANDSCAPES_BLOB_ID.

set -euo pipefail

die() { echo "download_landscapes.sh: $2" >&2; exit "$1"; }

remixable=
for arg in "$@"; do
    case $arg in
        --remixable) remixable=yes ;;
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) die 2 "unknown argument $arg: see --help" ;;
    esac
done
for tool in curl python3; do
    command -v $tool > /dev/null || die 1 "$tool is needed: install it"
done

cd "$(dirname "$0")"
url=https://github.com/ml5js/ml5-data-and-models/raw/master/datasets/images/landscapes
url=${LANDSCAPES_URL:-$url/landscapes_small.zip}
blob_id=${LANDSCAPES_BLOB_ID:-0f69e1ecd5f2876726961c07e739edca4429c2bf}
folder=data/landscapes
target=$(python3 -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$folder")
part=${target%/*}/landscapes_small.zip.part  # what has arrived
tmp=${target%/*}/.landscapes.tmp

count() {
    find -L "$folder" -type f \( -iname '*.jpg' -o -iname '*.jpeg' -o -iname '*.png' \) |
        wc -l | tr -d ' '
}

end_if_there() {  # what is there is kept, whoever put it there
    [ -n "$(ls -A "$target" 2> /dev/null)" ] || return 0
    [ "$(count)" != 0 ] || die 2 "$folder has no jpg or png photos: move it away and call again"
    [ -z "$remixable" ] || [ -e "$folder/.remixable" ] ||
        die 2 "$folder was not fetched with --remixable: move it away and call again"
    echo "$(count) photos already in $folder: python colorize.py"
    exit
}

lock() {  # lock LOCK_EX waits, lock LOCK_NB fails; macOS has no command for it
    python3 -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.$1)" 2> /dev/null
}

get() {  # get URL FILE: goes on where FILE ends; at a terminal it shows how far it is
    local progress=-sS
    if [ -t 2 ]; then progress=--progress-bar; fi
    curl -fL -C - --speed-time 60 "$progress" -o "$2" "$1"
}

is_whole() {  # by git's blob id: the SHA-1 of a short header and the bytes
    [ -f "$part" ] && python3 - "$part" "$blob_id" << 'EOF'
import hashlib, pathlib, sys
data = pathlib.Path(sys.argv[1]).read_bytes()
sys.exit(hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest() != sys.argv[2])
EOF
}

unpack() {  # unpack ARCHIVE TMP TARGET [RECORDS]: with records, only what may be changed
    python3 - "$@" << 'EOF'
import json, os, pathlib, sys, zipfile

def find_photos(archive):
    """Return the members that are photos, each renamed to KIND/PHOTO."""
    photos = []
    for member in archive.infolist():
        path = pathlib.PurePosixPath(member.filename)
        is_hidden = any(part.startswith(('.', '__MACOSX')) for part in path.parts)
        if path.suffix.lower() in ('.jpg', '.jpeg', '.png') and not is_hidden:
            member.filename = '/'.join(path.parts[-2:])
            photos.append(member)
    return photos

def find_remixable(photos, records):
    """Return the photos without license 3 or 6; raise KeyError where one has no record."""
    licenses = {}
    for file in pathlib.Path(records).iterdir():
        for key, record in json.loads(file.read_text('utf-8')).items():
            for name in key, record['clean_name']:  # a photo has one of these names
                licenses.setdefault(f'{file.name}/{name}', set()).add(str(record['license']))
    return [photo for photo in photos if not licenses[photo.filename] & {'3', '6'}]

try:
    path, tmp, target, *records = sys.argv[1:]
    with zipfile.ZipFile(path) as archive:
        photos = find_photos(archive)
        if records:
            photos = find_remixable(photos, *records)
        if not photos:
            raise ValueError('it has no photos to take')
        for photo in photos:
            archive.extract(photo, tmp)
    if records:
        pathlib.Path(tmp, '.remixable').touch()
    os.replace(tmp, target)  # fails if files have come up there meanwhile
    os.remove(path)
except Exception as error:  # a damaged archive can raise almost any
    line = ' '.join(f'{type(error).__name__}: {error}'.split())
    sys.exit(f'download_landscapes.sh: cannot unpack {path}: {line}')
EOF
}

end_if_there
mkdir -p data
exec 9>> "${target%/*}/.landscapes.lock"  # the lock is gone with the last process that has it open
lock LOCK_NB || {
    echo "download_landscapes.sh: another call is filling $folder: waiting for its end" >&2
    lock LOCK_EX || true  # some file systems of clusters have no locks
}
end_if_there
trap 'rm -rf "$tmp"' EXIT
rm -rf "$tmp"  # what a killed call left
mkdir -p "$tmp/photos" "$tmp/records"

if [ -n "$remixable" ]; then
    for kind in city field forest lake mountain ocean road; do
        record=${url%/*}/licenses/${kind}_photos_info.json
        get "$record" "$tmp/records/$kind" || die 1 "cannot fetch $record: call again"
    done
fi
if ! is_whole; then
    get "$url" "$part" ||
        die 1 "cannot fetch $url: call again to go on, or remove $part to begin again"
    is_whole || {
        rm -f "$part"
        die 1 "$url is corrupted, its git blob id is not $blob_id; removed: call again"
    }
fi
unpack "$part" "$tmp/photos" "$target" ${remixable:+"$tmp/records"}
echo "$(count) photos in $folder: python colorize.py"
