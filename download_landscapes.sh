#!/usr/bin/env bash
# Fetches the landscape photos that colorize.py learns from into data/landscapes, beside this file.
#
#   ./download_landscapes.sh               all photos, about 4,000
#   ./download_landscapes.sh --remixable   only those whose license allows derivatives
#
# A download that was cut off goes on where it stopped: call it again. Of two calls at once, the
# second waits for the first.
#
# data/landscapes may be a link to a folder on a larger disk. Everything is then kept in that
# folder, the archive too.
#
# The photos are landscapes_small.zip of https://github.com/ml5js/ml5-data-and-models, collected
# from Flickr; each keeps its photographer's license. The data set's README asks whoever builds on
# the images, or does generative work, to take out licenses 3 (CC BY-NC-ND) and 6 (CC BY-ND):
# --remixable does.
#
# LANDSCAPES_URL names another copy of the archive, with the license records in licenses/ beside
# it; LANDSCAPES_BLOB_ID is the git blob id that this copy must have.

set -euo pipefail

die() { echo "download_landscapes.sh: $2" >&2; exit "$1"; }
has() { command -v "$1" > /dev/null; }

remixable=
for arg in "$@"; do
    case $arg in
        --remixable) remixable=yes ;;
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) die 2 "unknown argument $arg: see --help" ;;
    esac
done

cd "$(dirname "$0")"
url=https://github.com/ml5js/ml5-data-and-models/raw/master/datasets/images/landscapes
url=${LANDSCAPES_URL:-$url/landscapes_small.zip}
blob_id=${LANDSCAPES_BLOB_ID:-0f69e1ecd5f2876726961c07e739edca4429c2bf}
[[ $blob_id =~ ^[0-9a-f]{40}$ ]] || die 2 "LANDSCAPES_BLOB_ID=$blob_id: give 40 hex digits"
folder=data/landscapes
part=data/landscapes_small.zip.part  # what has arrived
own=data/.landscapes                 # what else this script makes begins like this

count() {  # 3943 photos as 3,943
    { find -L "$folder" -type f ! -path '*/.*' \
        \( -iname '*.jpg' -o -iname '*.jpeg' -o -iname '*.png' \) 2> /dev/null || true; } |
        wc -l | tr -d ' ' | sed -e :a -e 's/\(.*[0-9]\)\([0-9]\{3\}\)/\1,\2/' -e ta
}

complete() {  # by git's blob id: the SHA-1 of a short header and the bytes
    [ -f "$part" ] && python3 - "$part" "$blob_id" 2> /dev/null << 'EOF'
import hashlib, pathlib, sys
data = pathlib.Path(sys.argv[1]).read_bytes()
sys.exit(hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest() != sys.argv[2])
EOF
}

get() {  # get URL FILE: goes on where FILE ends; at a terminal it shows how far it is
    local tool=(wget -c -T 60 -t 3 -O "$2" "$1") quiet=-nv
    if has curl; then
        tool=(curl -fL -C - --speed-time 60 --progress-bar -o "$2" "$1") quiet=-sS
    fi
    why='see above'
    # without the lock: the curl of a killed call lives on, and nobody is to wait for it
    if [ -t 2 ]; then "${tool[@]}" 9>&-; else why=$(exec 9>&-; "${tool[@]}" "$quiet" 2>&1); fi
}

unpack() {  # unpack ARCHIVE FOLDER [RECORDS]: with records, only what they allow to be changed
    python3 - "$@" << 'EOF'
import json, os, pathlib, re, stat, sys, zipfile

def refuse(text, code=1):
    line = ' '.join(text.split())  # names in an archive may hold anything
    print(''.join(c if c.isprintable() else '?' for c in line), file=sys.stderr)
    sys.exit(code)

def choose(archive):
    """Return the members that are photos, each with its folder as the first part of its name."""
    photos = []
    for member in archive.infolist():
        name = member.filename
        outside = re.search(r'^[/\\]|^\w:|(^|[/\\])\.\.([/\\]|$)', name)
        if outside or stat.S_ISLNK(member.external_attr >> 16):
            refuse(f'{name} is a link or lies outside the folder, so take another copy')
        hidden = re.search(r'(^|/)(\.[^/]|__MACOSX/)', name)
        if name.lower().endswith(('.jpg', '.jpeg', '.png')) and not hidden:
            photos.append(member)
    # the folders of the kinds may lie below others
    while (all(m.filename.count('/') > 1 for m in photos)
           and len({m.filename.split('/')[0] for m in photos}) == 1):
        for member in photos:
            member.filename = member.filename.split('/', 1)[1]
    return photos

def remixable(photos, records):
    """Return the photos whose license allows derivatives."""
    licenses = {}
    for file in records.iterdir():
        for key, record in json.loads(file.read_text('utf-8')).items():
            for name in (key, record['clean_name']):
                licenses.setdefault(f'{file.name}/{name}', set()).add(str(record['license']))
    for name in (m.filename for m in photos):
        if name not in licenses:
            refuse(f'{name} has no license record, so --remixable cannot tell', 2)
    return [m for m in photos if not licenses[m.filename] & {'3', '6'}]

def main(path, folder, *records):
    with zipfile.ZipFile(path) as archive:
        photos = choose(archive)
        if records:
            photos = remixable(photos, pathlib.Path(*records))
        if not photos:
            refuse('it has no photos to take')
        size = sum(m.file_size for m in photos)  # zipfile reads no more than this
        # photos are packed already, and hardly grow
        if size > 10 * os.path.getsize(path) + 2**20:
            refuse(f'it would grow to {size:,} bytes, so these are no photos: take another copy')
        for member in photos:
            archive.extract(member, folder)
    number = sum(len(files) for _, _, files in os.walk(folder))
    if number != len(photos):
        twice = len({m.filename for m in photos}) < len(photos)
        refuse(f'{number} of {len(photos)} photos have arrived in the folder: '
               + ('take another copy' if twice else 'call again'))

try:
    main(*sys.argv[1:])
except Exception as error:  # a damaged archive can raise almost any
    refuse(f'{type(error).__name__}: {error}')
EOF
}

end_if_there() {  # photos that are there are kept, whoever put them there
    if [ -f "$own.unfinished" ]; then
        [ "$(cat "$own.unfinished")" = "$remixable" ] ||
            die 2 "$folder was begun by a call with other arguments: call again with those"
        return
    fi
    [ -n "$(ls -A "$folder" 2> /dev/null |
            grep -Ev '^(\.landscapes\..*|\.DS_Store|lost\+found)$')" ] || return 0
    number=$(count)
    [ "$number" != 0 ] ||
        die 2 "$folder has files but no jpg or png photos: move it away and call again"
    [ -z "$remixable" ] || [ -e "$folder/.remixable" ] ||
        die 2 "$folder was not fetched with --remixable: move it away and call again"
    for part in data/landscapes_small.zip.part "$folder/.landscapes.zip.part"; do
        if complete; then rm -f "$part"; fi
    done
    echo "$number photos already in $folder: python colorize.py"
    exit
}

lock() {  # held by file descriptor 9, so gone with the last process that has it
    { exec 9>> "$own.lock"; } 2> /dev/null ||
        die 1 "$own.lock cannot be written: remove it and call again"
    python3 - "$folder" << 'EOF'
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print(f'download_landscapes.sh: another call is filling {sys.argv[1]}: waiting for its end',
          file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
    pass  # this file system has no locks
EOF
}

follow_link() {  # a link to a folder that is not there yet: make it, but not the disk it is on
    local target
    target=$(python3 -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$folder")
    mkdir "$target" 2> /dev/null || [ -d "$folder" ] ||
        die 1 "$folder is a link to $target, which cannot be made: make it, or remove the link"
}

clean() { rm -rf "$own".tmp.* 2> /dev/null || true; }

if [ -L "$folder" ] && [ ! -e "$folder" ] && has python3; then follow_link; fi
if [ -e "$folder" ] && [ ! -d "$folder" ]; then
    die 2 "$folder is a file: move it away and call again"
fi
if [ -d "$folder" ]; then  # fill it where it is: it may be a link, or a disk of its own
    part=$folder/.landscapes.zip.part own=$folder/.landscapes
fi
end_if_there

has curl || has wget || die 1 'curl or wget is needed: install one of them'
has python3 || die 1 'python3 is needed: install it'

mkdir -p data 2> /dev/null || die 1 'the folder data cannot be made here'
[ -w "${own%/*}" ] || die 1 "${own%/*} cannot be written: check whose folder it is"
lock
end_if_there
trap clean EXIT
clean  # what a killed call left
tmp=$(mktemp -d "$own.tmp.XXXXXX")

if [ -n "$remixable" ]; then
    mkdir "$tmp/records"
    for kind in city field forest lake mountain ocean road; do
        record=${url%/*}/licenses/${kind}_photos_info.json
        get "$record" "$tmp/records/$kind" ||
            die 1 "cannot fetch $record (${why##*$'\n'}): check the network and call again"
    done
fi

if ! complete; then
    # into a copy: the curl of a killed call may still be writing to the old file
    if [ -s "$part" ]; then cp "$part" "$tmp/part" && mv "$tmp/part" "$part"; fi
    status=0
    get "$url" "$part" || status=$?
    # curl's 33 and 22, wget's 8: the server cannot go on from this part, so take the whole
    if [[ -s $part && $status =~ ^(33|22|8)$ ]] && get "$url" "$tmp/part"; then
        mv "$tmp/part" "$part"
        status=0
    fi
    [ $status = 0 ] || die 1 "cannot fetch $url (${why##*$'\n'}): call again to go on"
    complete || {
        rm -f "$part"
        die 1 "$url is corrupted, its git blob id is not $blob_id; removed: call again"
    }
fi

new=$tmp/landscapes
why=$(unpack "$part" "$new" ${remixable:+"$tmp/records"} 2>&1) ||
    die $? "cannot unpack $part: ${why##*$'\n'}"
[ -z "$remixable" ] || touch "$new/.remixable"
if [ "$own" = "$folder/.landscapes" ]; then
    echo "$remixable" > "$own.unfinished"
    for entry in "$new"/* "$new"/.remixable; do  # a killed call may have moved some of them
        if [ -e "$entry" ] && [ ! -e "$folder/${entry##*/}" ]; then mv "$entry" "$folder"; fi
    done
    rm "$own.unfinished"
else  # unlike mv, this never moves into a folder that has come up
    python3 -c 'import os, sys; os.rename(*sys.argv[1:])' "$new" "$folder" 2> /dev/null ||
        die 1 "$folder has come up meanwhile: move it away and call again"
fi
rm -f "$part"
echo "$(count) photos in $folder: python colorize.py"
