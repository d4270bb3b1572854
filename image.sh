#!/bin/sh
# image.sh ACME-STEP IMAGE   pack the program, alone, as a container image
#
# It is an OCI layout, with the manifest.json of docker load beside it, in
# one archive.  The same program gives the same bytes: its times are those
# of the release, or SOURCE_DATE_EPOCH.
set -eu
umask 022
LC_ALL=C
export LC_ALL
program=$1 image=$2
src=$(dirname "$0")

# defined NAME: a number that acme.c defines.
defined() {
	sed -n "s/^#define $1 \"*\([0-9.]*\).*/\1/p" "$src/acme.c"
}
version=$(defined VERSION)
epoch=${SOURCE_DATE_EPOCH:-$(defined RELEASED)}
created=$(date -u -d "@$epoch" +%Y-%m-%dT%H:%M:%SZ)

# The processor, from the header of the program: it may not be this one.
case $(od -An -tu1 -j18 -N2 "$program" | tr -s ' ') in
' 62 0')	cpu='"architecture":"amd64"' ;;
' 183 0')	cpu='"architecture":"arm64"' ;;
' 40 0')	cpu='"architecture":"arm","variant":"v7"' ;;
' 3 0')		cpu='"architecture":"386"' ;;
' 0 22')	cpu='"architecture":"s390x"' ;;
*)		echo "image.sh: what processor is $program for?" >&2; exit 1 ;;
esac

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/root" "$tmp/oci/blobs/sha256"

# pack DIRECTORY NAME...: as an archive that tells nothing of who made it.
pack() {
	tar --format=ustar --sort=name --mtime="@$epoch" --owner=0 --group=0 \
	    --numeric-owner --mode=u=rwX,go=rX -C "$@"
}

# blob TYPE: keep standard input under its hash, and describe it.
blob() {
	cat >"$tmp/blob"
	hash=$(sha256sum <"$tmp/blob" | cut -d ' ' -f 1)
	described="\"mediaType\":\"application/vnd.oci.image.$1\",\
\"digest\":\"sha256:$hash\",\"size\":$(($(wc -c <"$tmp/blob")))"
	mv "$tmp/blob" "$tmp/oci/blobs/sha256/$hash"
}

cp "$program" "$tmp/root/acme-step"
chmod 755 "$tmp/root/acme-step"
pack "$tmp/root" -cf "$tmp/layer" acme-step
blob layer.v1.tar <"$tmp/layer"
layer=$hash layer_described=$described

blob config.v1+json <<END
{"created":"$created",$cpu,"os":"linux",
"config":{"Entrypoint":["/acme-step"],"WorkingDir":"/"},
"rootfs":{"type":"layers","diff_ids":["sha256:$layer"]},
"history":[{"created":"$created","created_by":"make image"}]}
END
config=$hash

blob manifest.v1+json <<END
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
"config":{$described},"layers":[{$layer_described}]}
END

cat >"$tmp/oci/index.json" <<END
{"schemaVersion":2,"manifests":[{$described,
"platform":{$cpu,"os":"linux"},"annotations":{
"io.containerd.image.name":"docker.io/library/acme-step:$version",
"org.opencontainers.image.ref.name":"$version"}}]}
END
echo '{"imageLayoutVersion":"1.0.0"}' >"$tmp/oci/oci-layout"
cat >"$tmp/oci/manifest.json" <<END
[{"Config":"blobs/sha256/$config","RepoTags":["acme-step:$version"],
"Layers":["blobs/sha256/$layer"]}]
END

pack "$tmp/oci" -cf "$tmp/image" blobs index.json manifest.json oci-layout
cp "$tmp/image" "$image"
