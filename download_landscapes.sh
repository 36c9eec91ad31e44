#!/usr/bin/env bash
# Fetches the landscape photos that colorize.py learns from into data/landscapes, beside this file.
#
#   ./download_landscapes.sh               all photos, about 4,000
#   ./download_landscapes.sh --remixable   only those whose licence allows derivatives
#
# A download that broke off goes on where it stopped: call it again.
#
# The photos are landscapes_small.zip of https://github.com/ml5js/ml5-data-and-models, collected
# from Flickr; each keeps its photographer's licence. The data set's README asks whoever builds on
# the images, or does generative work, to take out licences 3 (CC BY-NC-ND) and 6 (CC BY-ND):
# --remixable does.
#
# LANDSCAPES_URL names another copy of the archive, with the licence records in licenses/ beside
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
part=data/landscapes_small.zip.part

count() {  # 3943 photos as 3,943
    find -L "$folder" -type f ! -path '*/.*' \
        \( -iname '*.jpg' -o -iname '*.jpeg' -o -iname '*.png' \) |
        wc -l | tr -d ' ' | sed -e :a -e 's/\(.*[0-9]\)\([0-9]\{3\}\)/\1,\2/' -e ta
}

complete() {  # by git's blob id: the SHA-1 of a short header and the bytes
    [ -f "$part" ] && python3 - "$part" "$blob_id" << 'EOF'
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
    if [ -t 2 ]; then "${tool[@]}"; else why=$("${tool[@]}" "$quiet" 2>&1); fi
}

unpack() {  # unpack ARCHIVE FOLDER [RECORDS]: with records, only what they allow to be changed
    python3 - "$@" << 'EOF'
import json, pathlib, re, stat, sys, zipfile
archive = zipfile.ZipFile(sys.argv[1])
photos = []
for member in archive.infolist():
    name = member.filename
    outside = re.search(r'^[/\\]|^\w:|(^|[/\\])\.\.([/\\]|$)', name)
    if outside or stat.S_ISLNK(member.external_attr >> 16):
        sys.exit(f'{name} is a link or lies outside the folder, so take another copy')
    hidden = re.search(r'(^|/)(\.[^/]|__MACOSX/)', name)
    if name.lower().endswith(('.jpg', '.jpeg', '.png')) and not hidden:
        photos.append(member)
# the folders of the kinds may lie below others
while (all(m.filename.count('/') > 1 for m in photos)
       and len({m.filename.split('/')[0] for m in photos}) == 1):
    for member in photos:
        member.filename = member.filename.split('/', 1)[1]
if sys.argv[3:]:
    licences = {}
    for file in pathlib.Path(sys.argv[3]).iterdir():
        for key, record in json.loads(file.read_text('utf-8')).items():
            for name in (key, record['clean_name']):
                licences.setdefault(f'{file.name}/{name}', set()).add(str(record['license']))
    for name in (m.filename for m in photos):
        if name not in licences:
            print(name, 'has no licence record, so --remixable cannot tell', file=sys.stderr)
            sys.exit(2)
    photos = [m for m in photos if not licences[m.filename] & {'3', '6'}]
if not photos:
    sys.exit('it has no photos to take')
for member in photos:
    archive.extract(member, sys.argv[2])
EOF
}

# also what a killed call left; its unpacking may have outlived it and be in the way of rm
clean() { rm -rf "$folder".tmp.* 2> /dev/null || true; }
trap clean EXIT
clean

if [ -n "$(ls -A "$folder" 2> /dev/null)" ]; then
    number=$(count)
    [ "$number" != 0 ] ||
        die 2 "$folder has files but no jpg or png photos: move it away and call again"
    [ -z "$remixable" ] || [ -e "$folder/.remixable" ] ||
        die 2 "$folder was not fetched with --remixable: move it away and call again"
    if complete 2> /dev/null; then rm "$part"; fi
    echo "$number photos already in $folder: python colorize.py"
    exit
fi

has curl || has wget || die 1 'curl or wget is needed: install one of them'
has python3 || die 1 'python3 is needed: install it'

mkdir -p data
tmp=$(mktemp -d "$folder.tmp.XXXXXX")

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
# mv would move into a folder that is there
rmdir "$folder" 2> /dev/null || [ ! -e "$folder" ] || die 1 "$folder has come up meanwhile"
mv "$new" "$folder"
rm "$part"
echo "$(count) photos in $folder: python colorize.py"
