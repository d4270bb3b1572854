#!/bin/sh
# test.sh [check] [ACME-STEP]   test the program, from the outside
# test.sh offline [ACME-STEP]   the tests that need no network
# test.sh cross                 these, and an issuance, on other processors
# test.sh initramfs [ACME-STEP]  an issuance before there is a system
# test.sh old                   old kernels and sandboxes, and years to come
# test.sh builds                compilers, releases of Debian, and BearSSL
# test.sh faults [ACME-STEP]    let each system call of a step fail
# test.sh load [ACME-STEP]      the responders under load, 64 steps at once
# test.sh waits [ACME-STEP]     long waits: outages, suspension, clocks, DHCP
# test.sh fuzz [ACME-STEP]      random input to all that reads, for a while
# test.sh coverage              count the lines of acme.c that the tests run
# test.sh lint                  let other programs read the source
# test.sh bench [ACME-STEP]     report size, memory, round trips and time
# test.sh demo [ACME-STEP]      issue a certificate as the README does it
# test.sh image ACME-STEP FILE  pack the program as a container image
# test.sh deps                  see to it that what these need is there
#
# The CA is Pebble, which validates for real: its DNS answers come from
# pebble-challtestsrv, and a web server stands on loopback.  What our
# program makes is judged by openssl and by what the CA itself says.
#
# There are three kinds of tests: those without a network, those before
# servers of our own, for what Pebble does not do, and those before Pebble.
# Groups follow the sections of acme.c; before Pebble, where a group uses
# what earlier ones issued, they follow the life of a certificate.
#
# "not ok" is followed by what the test printed.  In the environment,
# TRACE=1 adds the commands of each test, and ONLY=REGEX runs the tests of
# those groups alone whose titles match, with all that prepares them.
# shellcheck disable=SC2016,SC2034	# check evaluates its words

task=check
case ${1-} in
check|offline|cross|initramfs|old|builds|faults|load|waits|fuzz|coverage|lint|\
bench|demo|deps)
	task=$1; shift ;;
esac
src=$(cd "$(dirname "$0")" && pwd)
acme=${1:-$src/acme-step}
case $acme in /*) ;; *) acme=$PWD/$acme ;; esac
cache=$src/.cache

# The tests know what is in their environment.
unset ACME_DIRECTORY ACME_KEY ACME_ACCOUNT ACME_CA_FILE ACME_TIMEOUT \
    ACME_RESOLVE ACME_PROXY_COMMAND ACME_BOX ACME_EAB_KID \
    ACME_EAB_HMAC_KEY SSL_CERT_FILE https_proxy no_proxy HTTPS_PROXY \
    NO_PROXY
LC_ALL=C
export LC_ALL
# Pebble can stop for ever if it runs on two processors: a request that reads
# its store locks that twice, and another that writes comes in between.
[ "$task" = bench ] || { GOMAXPROCS=1; export GOMAXPROCS; }

give_up() {
	echo "test.sh: $*" >&2
	exit 1
}

# ------------------------------------------------------ container image --

# defined NAME: a number that acme.c defines.
defined() {
	sed -n "s/^#define $1 \"*\([0-9.]*\).*/\1/p" "$src/acme.c"
}

# pack_image ACME-STEP IMAGE: the program, with LICENSE, as a container image.
# It is an OCI layout, with the manifest.json of docker load beside it, in
# one archive.  The same program gives the same bytes: its times are those
# of the release, or SOURCE_DATE_EPOCH.
pack_image() (
	set -eu
	umask 022
	program=$1 image=$2
	version=$(defined VERSION)
	epoch=${SOURCE_DATE_EPOCH:-$(defined RELEASED)}
	created=$(date -u -d "@$epoch" +%Y-%m-%dT%H:%M:%SZ)

	# The processor, from the program's header: it may not be this one.
	case $(od -An -tu1 -j18 -N2 "$program" | tr -s ' ') in
	' 62 0')	cpu='"architecture":"amd64"' ;;
	' 183 0')	cpu='"architecture":"arm64"' ;;
	' 40 0')	cpu='"architecture":"arm","variant":"v7"' ;;
	' 3 0')		cpu='"architecture":"386"' ;;
	' 0 22')	cpu='"architecture":"s390x"' ;;
	*)		echo "test.sh: what processor is $program for?" >&2
			exit 1 ;;
	esac

	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	mkdir -p "$tmp/root" "$tmp/oci/blobs/sha256"

	# pack DIRECTORY NAME...: an archive that does not tell who made it.
	pack() {
		tar --format=ustar --sort=name --mtime="@$epoch" --owner=0 \
		    --group=0 --numeric-owner --mode=u=rwX,go=rX -C "$@"
	}

	# blob TYPE: keep standard input under its hash, and describe it.
	blob() {
		cat >"$tmp/blob"
		hash=$(sha256sum <"$tmp/blob" | cut -d ' ' -f 1)
		size=$(($(wc -c <"$tmp/blob")))
		described="\"mediaType\":\"application/vnd.oci.image.$1\","
		described="$described\"digest\":\"sha256:$hash\",\"size\":$size"
		mv "$tmp/blob" "$tmp/oci/blobs/sha256/$hash"
	}

	cp "$program" "$tmp/root/acme-step"
	chmod 755 "$tmp/root/acme-step"
	cp "$src/LICENSE" "$tmp/root/LICENSE"
	pack "$tmp/root" -cf "$tmp/layer" LICENSE acme-step
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

	pack "$tmp/oci" -cf "$tmp/image" blobs index.json manifest.json \
	    oci-layout
	cp "$tmp/image" "$image"
)

if [ "${1-}" = image ]; then
	pack_image "$2" "$3"
	exit
fi

# ------------------------------------------------- what the tests need --

# A command or a file, and the Debian package that has it.
needs() {
	cat <<-'EOF'
	cc				gcc
	/usr/include/stdio.h		libc6-dev
	musl-gcc			musl-tools
	/usr/include/bearssl.h		libbearssl-dev
	readelf				binutils
	awk				mawk
	bash				bash
	busybox				busybox
	curl				curl
	dash				dash
	diff				diffutils
	ctags				universal-ctags
	dig				bind9-dnsutils
	idn2				idn2
	mount				mount
	openssl				openssl
	setpriv				util-linux
	tinyproxy			tinyproxy-bin
	xxd				xxd
	pgrep				procps
	socat				socat
	/etc/ssl/certs/ca-certificates.crt			ca-certificates
	/usr/share/keyrings/debian-archive-keyring.gpg	debian-archive-keyring
	EOF
	case $task in
	check)
		cat <<-'EOF'
		/bin/nc.openbsd			netcat-openbsd
		/usr/bin/systemd-analyze	systemd
		/usr/lib/python3/dist-packages/yaml	python3-yaml
		make				make
		runc				runc
		skopeo				skopeo
		umoci				umoci
		EOF
		;;
	cross|old)
		cat <<-'EOF'
		make				make
		aarch64-linux-gnu-gcc		gcc-aarch64-linux-gnu
		arm-linux-gnueabihf-gcc		gcc-arm-linux-gnueabihf
		i686-linux-gnu-gcc		gcc-i686-linux-gnu
		s390x-linux-gnu-gcc		gcc-s390x-linux-gnu
		qemu-s390x-static		qemu-user-static
		EOF
		;;
	initramfs)
		echo 'qemu-system-x86_64	qemu-system-x86'
		;;
	builds)
		cat <<-'EOF'
		debootstrap			debootstrap
		xz				xz-utils
		EOF
		;;
	load)
		echo 'dnsperf			dnsperf'
		;;
	fuzz)
		cat <<-'EOF'
		clang				clang
		/usr/share/doc/libclang-rt-dev	libclang-rt-dev
		/usr/include/openssl/x509.h	libssl-dev
		EOF
		;;
	coverage)
		cat <<-'EOF'
		clang				clang
		llvm-cov			llvm
		/usr/share/doc/libclang-rt-dev	libclang-rt-dev
		EOF
		;;
	lint)
		cat <<-'EOF'
		clang-tidy			clang-tidy
		cppcheck			cppcheck
		shellcheck			shellcheck
		EOF
		;;
	esac
}

missing() {
	needs | while read -r thing package; do
		case $thing in
		/*)	[ -e "$thing" ] ;;
		*)	command -v "$thing" >/dev/null ;;
		esac || echo "$package"
	done
}

packages() {
	# shellcheck disable=SC2046	# one word a package
	set -- $(missing)
	[ $# = 0 ] && return
	[ "$(id -u)" = 0 ] || give_up "please install: $*"
	command -v apt-get >/dev/null || give_up "please install: $*"
	echo "test.sh: installing $*"
	DEBIAN_FRONTEND=noninteractive
	export DEBIAN_FRONTEND
	{ apt-get -q update &&
	  apt-get -q -y --no-install-recommends install "$@"; } \
	    >"$cache/apt.log" 2>&1 || {
		cat "$cache/apt.log" >&2
		give_up "cannot install: $*"
	}
	[ -z "$(missing)" ] || give_up "still missing:" "$(missing)"
}

# apt-get with a state of its own, so that the machine's stays as it is.
private_apt() {
	apt-get -q -o Dir::State::lists="$cache/lists" -o Dir::Cache="$cache" \
	    -o APT::Sandbox::User=root "$@"
}

unstable_apt() {
	private_apt -o Dir::Etc::sourcelist="$cache/unstable.list" \
	    -o Dir::Etc::sourceparts=/dev/null "$@"
}

# Where this machine gets Debian from; the origin is known only once the
# lists have been fetched.
mirror() {
	{ apt-get indextargets --format '$(SITE) $(ORIGIN) $(CODENAME)'
	  private_apt update >/dev/null
	  private_apt indextargets --format '$(SITE) $(ORIGIN) $(CODENAME)'
	} | awk '$2 == "Debian" && $3 !~ /security/ { print $1; exit }'
}

# Pebble comes from Debian unstable; older releases do not have it.  It is
# unpacked aside and renamed, since two runs may get here at once.
fetch_pebble() (
	mkdir -p "$cache/lists/partial" "$cache/archives/partial" &&
	new=$(mktemp -d "$cache/new.XXXXXX") && cd "$new" || exit
	chmod 755 .
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]" \
	    "$(mirror) unstable main" >"$cache/unstable.list" &&
	unstable_apt update && unstable_apt download pebble &&
	dpkg-deb -x pebble_*.deb . && usr/bin/pebble -version || exit
	mv -T "$new" "$cache/pebble" || [ -x "$cache/pebble/usr/bin/pebble" ]
)

# Those of cross: what Debian calls it, its compiler, what qemu calls it.
processors() {
	cat <<-'EOF'
	arm64	aarch64-linux-gnu	aarch64
	armhf	arm-linux-gnueabihf	arm
	i386	i686-linux-gnu		i386
	s390x	s390x-linux-gnu		s390x
	EOF
}

# unpack DIRECTORY ARCHITECTURE PACKAGE...: those of this machine's
# release.  A package that has no files stands for the first it depends on.
unpack() {
	mkdir "$1" && cd "$1" || return
	cpu=$2 own=$PWD; shift 2
	mkdir -p lists/partial "$cache/archives/partial"
	# shellcheck disable=SC1091	# the system's
	release=$(. /etc/os-release && echo "$VERSION_CODENAME")
	keys=/usr/share/keyrings/debian-archive-keyring.gpg
	echo "deb [arch=$cpu signed-by=$keys] $site $release main" \
	    >release.list
	release_apt() {
		private_apt -o Dir::State::lists="$own/lists" \
		    -o Dir::Etc::sourcelist="$own/release.list" \
		    -o Dir::Etc::sourceparts=/dev/null \
		    -o APT::Architectures="$cpu" "$@"
	}
	release_apt update || return
	for package; do
		release_apt download "$package:$cpu" || return
		case $package in
		linux-image-*)
			package=$(dpkg-deb -f "$package"_*.deb Depends)
			release_apt download "${package%% *}:$cpu" || return
			;;
		esac
	done
	for deb in *.deb; do
		dpkg-deb -x "$deb" . || return
	done
	rm -rf lists release.list ./*.deb
	cd ..
}

# musl and BearSSL for these processors: the compilers build against them.
# BearSSL is laid out as its source tree would be once built.
fetch_foreign() (
	new=$(mktemp -d "$cache/new.XXXXXX") && cd "$new" || exit
	chmod 755 .
	site=$(mirror)
	for cpu in $(processors | cut -f 1); do
		unpack "$cpu" "$cpu" musl-dev libbearssl-dev &&
		mkdir "$cpu/build" &&
		mv "$cpu"/usr/lib/*/libbearssl.a "$cpu/build" &&
		mv "$cpu/usr/include/bearssl" "$cpu/inc" &&
		mv "$cpu"/usr/lib/*/musl-gcc.specs "$cpu/specs" || exit
	done
	mv -T "$new" "$cache/foreign" || [ -e "$cache/foreign/s390x/specs" ]
)

# A kernel, its driver of qemu's network card, and a shell.
fetch_machine() (
	new=$(mktemp -d "$cache/new.XXXXXX") && cd "$new" || exit
	site=$(mirror)
	unpack all amd64 linux-image-cloud-amd64 busybox-static &&
	mv all/boot/vmlinuz-* vmlinuz &&
	mv all/bin/busybox . 2>/dev/null || mv all/usr/bin/busybox . || exit
	release=$(basename all/lib/modules/* all/usr/lib/modules/* | head -n 1)
	mkdir -p "modules/$release" || exit
	find all -name 'virtio*.ko*' -o -name '*failover.ko*' |
	grep -e /net -e /drivers/virtio/ |
	while read -r module; do
		mv "$module" "modules/$release" || exit
	done || exit
	for module in "modules/$release"/*.xz; do
		[ ! -e "$module" ] || busybox unxz "$module" || exit
	done
	rm -rf all
	mv -T "$new" "$cache/machine" || [ -e "$cache/machine/vmlinuz" ]
)

# Releases of Debian, with what README's BUILDING names, and BearSSL's source
# tree.
fetch_debian() (
	new=$(mktemp -d "$cache/new.XXXXXX") && cd "$new" || exit
	chmod 755 .
	site=$(mirror)
	for release in bookworm trixie; do
		debootstrap --variant=minbase --include=binutils,clang,\
faketime,gcc,libbearssl-dev,libc6-dev,locales,make,musl-tools \
		    "$release" "$new/$release" "$site" &&
		chroot "$release" localedef -i tr_TR -f UTF-8 tr_TR.UTF-8 &&
		chroot "$release" apt-get clean || exit
	done
	mv -T "$new" "$cache/debian" || [ -e "$cache/debian/trixie/usr" ]
)
fetch_bearssl() (
	new=$(mktemp -d "$cache/new.XXXXXX") && cd "$new" || exit
	chmod 755 .
	mkdir -p lists/partial "$cache/archives/partial"
	# shellcheck disable=SC1091	# the system's
	release=$(. /etc/os-release && echo "$VERSION_CODENAME")
	keys=/usr/share/keyrings/debian-archive-keyring.gpg
	echo "deb-src [signed-by=$keys] $(mirror) $release main" >source.list
	for what in update 'source --download-only bearssl'; do
		# shellcheck disable=SC2086	# two words and an option
		private_apt -o Dir::State::lists="$new/lists" \
		    -o Dir::Etc::sourcelist="$new/source.list" \
		    -o Dir::Etc::sourceparts=/dev/null $what || exit
	done
	mkdir tree &&
	tar xf bearssl_*.orig.tar.* --strip-components=1 -C tree &&
	[ -e tree/inc/bearssl.h ] || exit
	mv -T tree "$cache/bearssl" || [ -e "$cache/bearssl/inc" ] || exit
	cd .. && rm -rf "$new"
)

# Servers and tools of others, and the libraries that they lack here.  They
# are unpacked, not installed: a package would start its server.
fetch_servers() (
	new=$(mktemp -d "$cache/new.XXXXXX") && cd "$new" || exit
	chmod 755 .
	mkdir -p "$cache/lists/partial" "$cache/archives/partial"
	private_apt update &&
	private_apt -s --no-install-recommends install nginx bind9 \
	    bind9-utils haproxy caddy kubernetes-client microsocks >plan || exit
	sed -n 's/^Inst \([^ ]*\) .*/\1/p' plan | while read -r package; do
		private_apt download "$package" || exit
	done || exit
	for deb in *.deb; do
		[ ! -e "$deb" ] || dpkg-deb -x "$deb" . || exit
	done
	rm -f ./*.deb plan
	mv -T "$new" "$cache/servers" || [ -e "$cache/servers" ]
)

# be_server COMMAND...: become a program that finds them.  With "&" the
# process has the number $!.
be_server() {
	there=$cache/servers/usr
	PATH=$PATH:/usr/sbin:$there/sbin:$there/bin
	# shellcheck disable=SC2116	# a pattern
	LD_LIBRARY_PATH=$(echo "$there"/lib/*-linux-gnu)
	export PATH LD_LIBRARY_PATH
	exec "$@"
}
with_servers() ( be_server "$@" )

# fetched FILE WHAT: it is in the cache, or is put there.
fetched() {
	[ -e "$cache/$1" ] && return
	echo "test.sh: fetching $2"
	case $2 in
	pebble)		fetch_pebble ;;
	servers)	fetch_servers ;;
	foreign)	fetch_foreign ;;
	machine)	fetch_machine ;;
	debian)		fetch_debian ;;
	bearssl)	fetch_bearssl ;;
	esac >"$cache/$2.log" 2>&1 || {
		cat "$cache/$2.log" >&2
		give_up "cannot fetch $2"
	}
}

deps() {
	mkdir -p "$cache" || exit
	packages
	case $task in
	offline|lint|coverage)	return ;;
	cross|old)	fetched foreign/s390x/specs foreign ;;
	initramfs)	fetched machine/vmlinuz machine ;;
	builds)
		[ "$(id -u)" = 0 ] || give_up 'builds needs root'
		fetched debian/trixie/usr debian
		fetched bearssl/inc/bearssl.h bearssl
		;;
	check|waits)	fetched servers servers ;;
	esac
	fetched pebble/usr/bin/pebble pebble
}

deps
[ "$task" = deps ] && exit
case $task in
cross|old|builds|coverage|lint)	;;
*)		[ -x "$acme" ] || give_up "no $acme: run make" ;;
esac

# ------------------------------------------------------------- helpers --

tmp=$(mktemp -d) || exit
pids='' pebble_pids='' n=0 bad=0
clean() {
	trap '' HUP INT TERM
	# shellcheck disable=SC2086	# one word a process
	kill $pids $pebble_pids 2>/dev/null
	wait
	chmod -R u+w "$tmp"
	rm -rf "$tmp"
}
trap clean EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
cd "$tmp" || exit
mkdir bin && ln -s "$acme" bin/acme-step || exit
PATH=$tmp/bin:$PATH
export PATH

group() {
	wanted=$(printf '%s\n' "$1" | grep -Ee "${ONLY-}")
	echo "# $1"
}

# check NAME CODE...: the code must succeed; it runs in a subshell.
check() {
	[ "$wanted" ] || return 0
	title=$1 n=$((n + 1)); shift
	if (${TRACE:+set -x}; eval "$*") </dev/null >log 2>&1; then
		printf 'ok %d - %s\n' "$n" "$title"
	else
		printf 'not ok %d - %s\n' "$n" "$title"
		cat -v log | sed 's/^/# /'
		bad=$((bad + 1))
	fi
}

# dies STATUS WORDS CODE...: it exits so and says so, in one line on
# standard error and nothing on standard output.
dies() {
	want=$1 words=$2; shift 2
	code=$*
	check "dies $want, $words: $(printf %s "$code" |
	    tr -s ' \t\n' ' ')" died
}

died() {
	(set +x; eval "$code") >out 2>err
	got=$?
	echo "exit status $got"
	cat out err
	# shellcheck disable=SC2254	# a pattern
	case $got in $want) ;; *) return 1 ;; esac
	[ ! -s out ] && grep -q -e "$words" err &&
	    [ "$(grep -c '' err)" = 1 ] && grep -q '^acme-step: ' err
}

# not COMMAND...: it fails, and is not ended by a signal.
not() {
	"$@"
	set -- $?
	[ "$1" != 0 ] && [ "$1" -lt 128 ]
}

# await COMMAND...: up to 20 seconds until it succeeds.
await() {
	for _ in $(seq 100); do
		"$@" >/dev/null 2>&1 && return
		sleep 0.2
	done
	echo "no success: $*"
	return 1
}

# server_start COMMAND...: in the background, until the end of the tests.
server_start() {
	"$@" >>servers.log 2>&1 &
	pids="$pids $!"
}

# A port that nobody has, below those that the system gives to clients;
# at random, so that runs at the same time do not meet.
free_port() {
	while
		port=$(shuf -i 20000-31999 -n 1)
		grep -qi "$(printf ':%04X ' "$port")" /proc/net/tcp \
		    /proc/net/udp /proc/net/tcp6 /proc/net/udp6 2>/dev/null
	do :; done
	echo "$port"
}

# listening PORT
listening() {
	cat /proc/net/tcp /proc/net/tcp6 2>/dev/null |
	grep -qi "$(printf ':%04X 0*:0000 0A' "$1")"
}

# has_v6: this machine knows IPv6.
has_v6() {
	grep -q 0 /proc/net/if_inet6 2>/dev/null
}

# -------------------------------------------------- the CA and the web --

# Everything that Pebble needs beside itself.
world_start() {
	dns=$(free_port)
	dns_control=$(free_port)
	web=$(free_port)
	tls=$(free_port)
	www=$tmp/www/.well-known/acme-challenge
	mkdir -p "$www"
	certificates
	bin=$cache/pebble/usr/bin
	server_start "$bin/pebble-challtestsrv" -dnsserver "127.0.0.1:$dns" \
	    -management "127.0.0.1:$dns_control" -http01 '' -https01 '' \
	    -tlsalpn01 '' -doh '' -defaultIPv4 127.0.0.1 -defaultIPv6 ''
	# Its own listener would drop connections that come all at once.
	server_start socat \
	    "TCP-LISTEN:$web,bind=127.0.0.1,fork,reuseaddr,backlog=999" \
	    "EXEC:busybox httpd -i -h $tmp/www"
	up "$dns_control" "$web"
}

# up PORT...: wait until there are servers.
up() {
	for port_wanted; do
		await listening "$port_wanted" || give_up "$(cat servers.log)"
	done
}

# A throw-away CA for Pebble's own HTTPS.
certificates() {
	cat >server.ext <<-EOF
	basicConstraints = CA:FALSE
	subjectAltName = DNS:localhost,DNS:pebble.test,IP:127.0.0.1,IP:::1,\
	    IP:10.0.2.2
	EOF
	new='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'
	# shellcheck disable=SC2086	# options
	{ openssl req -x509 $new -keyout ca.key -out ca.pem -days 30 \
	    -subj '/CN=test CA' &&
	  openssl req $new -keyout server.key -out server.csr -subj / &&
	  openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key \
	    -CAcreateserial -days 30 -extfile server.ext -out server.pem
	} 2>>servers.log || give_up "$(cat servers.log)"
}

eab=false
retry_after=1
mac_key=zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W

# pebble_start [VARIABLE=VALUE]...: a new Pebble, in that environment.
pebble_start() {
	pebble=$(free_port)
	management=$(free_port)
	cat >pebble.json <<-EOF
	{ "pebble": {
		"listenAddress": "127.0.0.1:$pebble",
		"managementListenAddress": "127.0.0.1:$management",
		"certificate": "server.pem", "privateKey": "server.key",
		"httpPort": $web, "tlsPort": $tls,
		"externalAccountBindingRequired": $eab,
		"externalAccountMACKeys": {
			"kid-1": "$mac_key", "kid-2": "$mac_key" },
		"domainBlocklist": ["blocked.test"],
		"retryAfter": { "authz": $retry_after, "order": $retry_after },
		"keyAlgorithm": "ecdsa",
		"profiles": {
			"default": {
				"description": "ninety days",
				"validityPeriod": 7776000 },
			"shortlived": {
				"description": "six days",
				"validityPeriod": 518400 } }
	} }
	EOF
	env PEBBLE_VA_NOSLEEP=1 PEBBLE_AUTHZREUSE=0 "$@" \
	    "$bin/pebble" -config pebble.json -dnsserver "127.0.0.1:$dns" \
	    >>servers.log 2>&1 &
	pebble_pids=$!
	up "$pebble" "$management"
	control roots/0 >root.pem || give_up "no root certificate of pebble"
	ACME_DIRECTORY=https://localhost:$pebble/dir
	ACME_CA_FILE=$tmp/ca.pem
	ACME_TIMEOUT=60
	export ACME_DIRECTORY ACME_CA_FILE ACME_TIMEOUT
}

pebble_stop() {
	{ kill "$pebble_pids" && wait "$pebble_pids"; } 2>>servers.log
	pebble_pids=
}

# control PATH: ask Pebble's management interface.
control() {
	curl -sS --fail --cacert ca.pem "https://127.0.0.1:$management/$1"
}

# resolver COMMAND JSON: tell the DNS server what to answer.
resolver() {
	curl -sS --fail -d "$2" "http://127.0.0.1:$dns_control/$1"
}

# What a script does with the challenges of the record on its standard
# input, where it publishes them itself.
publish() {
	grep '^challenge ' |
	while read -r _ type _ _ _ name content; do
		case $type in
		http-01)
			printf %s "$content" >"$www/$name" ;;
		dns-*)
			resolver set-txt "{\"host\": \"$name.\",
			    \"value\": \"$content\"}" ;;
		*)	echo "what is $type?"; return 1 ;;
		esac || return
	done
}

# -------------------------------------------------------------- oracles --

# issued KEY CHAIN NAME...: the chain ends at Pebble's root, and the leaf
# is for that key and those names, written as openssl does.
issued() {
	key=$1 chain=$2; shift 2
	openssl verify -CAfile root.pem -untrusted "$chain" "$chain" &&
	openssl pkey -in "$key" -pubout >want.pub &&
	openssl x509 -in "$chain" -noout -pubkey | diff want.pub - &&
	printf '%s\n' "$@" | sort >want.names &&
	names_in "$chain" | diff want.names -
}

# names_in CERT: those of its subjectAltName, sorted.
names_in() {
	openssl x509 -in "$1" -noout -ext subjectAltName |
	sed -e 1d -e 's/^ *//' -e 's/, /\
/g' | sort
}

# oracle KEY: of its JWK (RFC 7638 3), by openssl alone.
base64url() { openssl base64 -A | tr '+/' '-_' | tr -d =; }
from_base64url() {
	tr -- '-_' '+/' | awk '{ while (length % 4) $0 = $0 "="; print }' |
	    openssl base64 -d -A
}
jwk() {
	openssl pkey -in "$1" -pubout -outform DER -out pub.der || return
	text=$(openssl pkey -in "$1" -noout -text)
	case $text in
	*modulus*)
		n=$(openssl rsa -in "$1" -noout -modulus | cut -d = -f 2 |
		    xxd -r -p | base64url)
		printf '{"e":"AQAB","kty":"RSA","n":"%s"}' "$n"
		return ;;
	*P-256*) crv=P-256 size=32 ;;
	*P-384*) crv=P-384 size=48 ;;
	esac
	printf '{"crv":"%s","kty":"EC","x":"%s","y":"%s"}' "$crv" \
	    "$(tail -c $((2 * size)) pub.der | head -c "$size" | base64url)" \
	    "$(tail -c "$size" pub.der | base64url)"
}
oracle() { jwk "$1" | openssl dgst -sha256 -binary | base64url; }

# field KEYWORD [RECORD]: the first such line's rest.
field() {
	sed -n "s/^$1 //p" ${2+"$2"} | head -n 1
}

# status_of CERT: what the CA says of it, in JSON.
status_of() {
	control "cert-status-by-serial/$(
	openssl x509 -in "$1" -noout -serial | cut -d= -f2)"
}

# The README's first pipeline, with the web server's real directory.
quick_start() {
	awk '/^[^ \t]/ { inside = /^QUICK START/; next }
	    !inside || !NF { block = 0; next }
	    /^[ \t]+acme-step key / { block = 1 }
	    block { sub(/^[ \t]+/, ""); print }' "$src/README" |
	sed "s|/var/www/acme|$www|"
}

# ----------------------------------------------------------------- demo --

demo() {
	world_start
	pebble_start
	quick_start >quick
	[ -s quick ] || give_up "no commands in README"
	cat <<-EOF
	A CA and a web server are on loopback, until this ends.  Here are
	the commands of the README, with this web server's directory; the
	environment says which CA, and which root its TLS certificate has:

	ACME_DIRECTORY=$ACME_DIRECTORY
	ACME_CA_FILE=$ACME_CA_FILE

	EOF
	while IFS= read -r line <&3; do
		command=${command:+$command
}$line
		case $line in *\||*\\) continue ;; esac
		run "$command"
		command=
	done 3<quick
	printf '\nWhat they left, and what openssl says of it:\n\n'
	run 'ls -l account.pem example.pem account fullchain.pem'
	run 'cat account'
	run 'openssl x509 -in fullchain.pem -noout -issuer -ext subjectAltName'
	run 'openssl verify -CAfile root.pem \
    -untrusted fullchain.pem fullchain.pem'
	printf '\nIt works.  All of it is removed now.\n'
}

run() {
	printf '$ %s\n' "$1"
	eval "$1" || exit
}

# ---------------------------------------------------------------- bench --

# The clients are compared in pairs of runs, one after the other, on the same
# machine and CA; of several runs the medians count.
clients='acme-step lego uacme dehydrated certbot acme.sh'

bench() {
	world_start
	retry_after=0
	pebble_start PEBBLE_WFE_NONCEREJECT=0
	unset ACME_DIRECTORY ACME_CA_FILE
	tools
	trust
	echo "machine: $(nproc) CPUs, $(sed -n 's/^model name.*: //p;T;q' \
	    /proc/cpuinfo); Debian $(cat /etc/debian_version)," \
	    "Linux $(uname -r); Pebble $("$bin/pebble" -version 2>&1 |
	    sed -n 's/.*version: //p')"
	printf '\nsize on disk, in KiB, with all packages that it needs:\n'
	echo "$(acme-step version): $(($(wc -c <"$acme") / 1024))"
	for client in $clients; do
		[ "$client" = acme-step ] || disk_size "$client"
	done
	echo "a step without network: $(memory acme-step version) KiB;" \
	    "an empty static process: $(memory empty)"
	job 25 1 5 small 'one name, 25 ms each way'
	job 25 20 3 small 'twenty names, 25 ms each way'
	job 0 1 5 small 'one name, no delay'
	job 0 1 5 system 'one name, no delay, the trust anchors of the system'
	job 0 100 1 small 'a hundred names, no delay'
}

# disk_size PACKAGE: its version and size, with all that it depends on.
disk_size() {
	apt-get -q -y --no-install-recommends install "$1" >>apt.log 2>&1 || {
		echo "$1: this release has no such package"
		return
	}
	apt-cache depends --recurse --installed --no-recommends --no-suggests \
	    --no-conflicts --no-breaks --no-replaces --no-enhances "$1" |
	grep '^[a-z0-9]' | sort -u |
	xargs dpkg-query -W -f '${Package} ${Version} ${Installed-Size}\n' |
	awk -v p="$1" '{ all += $3 } $1 == p { v = $2; own = $3 }
	    END { print p, v ": " all " (itself " own ")" }'
}

# trust: what /etc/ssl/certs is for the clients, in namespaces of their own:
# small, with the root of Pebble alone, or as the system has it.
trust() {
	mkdir small system
	cp ca.pem small/ca-certificates.crt
	cp -rL /etc/ssl/certs/. system/
	cat ca.pem >>system/ca-certificates.crt
}
trusting() {
	certs=$1; shift
	unshare -m sh -c 'mount --bind "$1" /etc/ssl/certs || exit
	    shift; exec "$@"' sh "$certs" "$@"
}

# job MS NAMES RUNS CERTS TITLE: all clients, RUNS times in turn; a line for
# each, with the medians.
job() {
	ms=$1 names=$2 runs=$3 certs=$4
	printf '\n%s, %s run(s)\n' "$5" "$runs"
	row='%-11s %9s %9s %9s %6s %9s %6s\n'
	# shellcheck disable=SC2059	# they are its columns
	printf "$row" client 'wall s' 'CPU s' 'peak KiB' conn. requests trips
	front=$(free_port)
	echo "$front" >front
	server_start delay "$front" "$pebble" "$ms" traffic
	relay=$!
	up "$front"
	: >results >failures
	here=
	for client in $clients; do
		if ! command -v "$client" >>apt.log; then
			echo "$client: absent" >>failures
		elif ! begin "$client"; then
			echo "$client: no account" >>failures
		else
			here="$here $client"
		fi
	done
	for run in $(seq "$runs"); do
		for client in $here; do
			one_run
		done
	done
	for client in $clients; do
		! grep -q "^$client " results || medians
		grep "^$client:" failures | uniq -c
	done
	kill "$relay"
}

# one_run: by this client, for new names.
one_run() {
	set --
	while [ $# -lt "$names" ]; do
		set -- "$@" "n$#-$run-$ms-$certs-$names.bench.test"
	done
	: >traffic
	before=$(asked)
	if (cd "$client" && trusting "../$certs" ../bin/meter ../usage \
	    sh ../order.sh "$client" "$@") >client.log 2>&1
	then
		# Of a pipeline the steps count, not the shell and the meter.
		files=usage
		[ "$client" != acme-step ] || files='step.1 step.2 step.3'
		# shellcheck disable=SC2086	# files
		peak=$(cut -d' ' -f1 $files | sort -n | tail -n 1)
		echo "$client $peak $(cut -d' ' -f2- usage)" \
		    "$(grep -c C traffic)" \
		    "$(($(asked) - before)) $(trips <traffic)" >>results
	else
		echo "$client: $(tail -n 1 client.log | cut -c1-60)" >>failures
	fi
}
asked() { grep -c 'calling handler' servers.log; }
# trips: times when the clients' voice is followed by the CA's.
trips() { tr -d 'C\n' | tr -s '<>' | tr -d '>' | wc -c; }

medians() {
	set -- "$client"
	for column in 2 3 1 4 5 6; do
		set -- "$@" "$(sed -n "s/^$client //p" results |
		cut -d' ' -f"$column" | sort -n |
		awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }')"
	done
	# shellcheck disable=SC2059	# the words of job
	printf "$row" "$@"
}

# begin CLIENT: a new account, in a directory named after the client.
begin() (
	rm -rf "$1"
	mkdir -p "$1" && cd "$1" || exit
	trusting ../small sh ../account.sh "$1" >../client.log 2>&1
)

# What users of these clients write, each in its directory; they share the
# web server's directory and the elliptic curve.
scripts() {
	cat >account.sh <<-END
	url=https://localhost:\$(cat ../front)/dir
	case \$1 in
	acme-step)
		acme-step key -o key.pem && acme-step key -o leaf.pem &&
		acme-step new-account -k key.pem -d "\$url" -y -o account ;;
	lego)
		set -- begin.bench.test
		. ../lego.sh ;;
	uacme)	uacme -y -a "\$url" -c conf -t EC new ;;
	dehydrated)
		cat >config <<-EOF
		CA=\$url
		CHALLENGETYPE=http-01
		WELLKNOWN=$www
		KEY_ALGO=prime256v1
		BASEDIR=\$PWD
		EOF
		dehydrated -f config --register --accept-terms ;;
	certbot)
		set -- begin.bench.test
		. ../certbot.sh ;;
	esac
	END
	cat >lego.sh <<-END
	lego --server "\$url" -a -m ops@example.com --path "\$PWD/lego" \
	    -k ec256 --http --http.webroot "$tmp/www" \
	    \$(printf -- '-d %s ' "\$@") run
	END
	cat >certbot.sh <<-END
	certbot certonly -n --agree-tos -m ops@example.com --server "\$url" \
	    --webroot -w "$tmp/www" --config-dir conf --work-dir work \
	    --logs-dir logs --key-type ecdsa --elliptic-curve secp256r1 \
	    \$(printf -- '-d %s ' "\$@")
	END
	cat >hook.sh <<-END
	#!/bin/sh
	[ "\$2" = http-01 ] || exit 1
	case \$1 in
	begin)	printf %s "\$5" >"$www/\$4" ;;
	*)	rm "$www/\$4" ;;
	esac
	END
	chmod +x hook.sh
	cat >order.sh <<-END
	url=https://localhost:\$(cat ../front)/dir
	client=\$1
	shift
	case \$client in
	acme-step)
		ACME_KEY=key.pem ACME_ACCOUNT=account
		export ACME_KEY ACME_ACCOUNT
		meter=../bin/meter
		\$meter ../step.1 acme-step new-order "\$@" |
		\$meter ../step.2 acme-step respond -w "$www" |
		\$meter ../step.3 acme-step finalize -K leaf.pem -o chain ;;
	lego)	. ../lego.sh ;;
	uacme)	uacme -a "\$url" -c conf -h ../hook.sh -t EC issue "\$@" ;;
	dehydrated)
		dehydrated -f config -c \$(printf -- '-d %s ' "\$@") ;;
	certbot)
		. ../certbot.sh ;;
	esac
	END
}

# tools: meter FILE COMMAND...: run it, and write peak memory in KiB, wall
# and CPU seconds to FILE.  It is small itself: a process counts what it had
# before exec, too.  delay PORT TO MS LOG: hand connections on, each byte MS
# later, and write C for a connection, > for each write of a client, and <
# for each of the server.
tools() {
	echo 'int main(void) { return 0; }' >empty.c
	cat >meter.c <<-'END'
	#include <stdio.h>
	#include <sys/resource.h>
	#include <sys/wait.h>
	#include <time.h>
	#include <unistd.h>
	#define S(t) (t.tv_sec + t.tv_usec / 1e6)
	int
	main(int argc, char **argv)
	{
		struct timespec a, b;
		struct rusage u;
		int status = 0;
		FILE *f;

		clock_gettime(CLOCK_MONOTONIC, &a);
		if (argc > 2 && vfork() == 0) {
			execvp(argv[2], argv + 2);
			_exit(127);
		}
		wait(&status);
		getrusage(RUSAGE_CHILDREN, &u);
		clock_gettime(CLOCK_MONOTONIC, &b);
		f = fopen(argv[1], "w");
		fprintf(f, "%ld %.2f %.3f\n", u.ru_maxrss,
		    (b.tv_sec - a.tv_sec) + (b.tv_nsec - a.tv_nsec) / 1e9,
		    S(u.ru_utime) + S(u.ru_stime));
		fclose(f);
		return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
	}
	END
	cat >delay.c <<-'END'
	#include <arpa/inet.h>
	#include <fcntl.h>
	#include <netinet/tcp.h>
	#include <poll.h>
	#include <signal.h>
	#include <stdio.h>
	#include <stdlib.h>
	#include <string.h>
	#include <sys/socket.h>
	#include <time.h>
	#include <unistd.h>
	enum { MOST = 64 };
	struct piece {			/* n is 0: the end */
		struct piece *next;
		double due;
		size_t n, at;
		char b[16384];
	};
	static struct { int fd, other; struct piece *first, **last; } end[MOST];
	static double
	now(void)
	{
		struct timespec t;

		clock_gettime(CLOCK_MONOTONIC, &t);
		return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
	}
	static int
	place(int port, int listens)
	{
		struct sockaddr_in a = { .sin_family = AF_INET,
		    .sin_port = htons(port),
		    .sin_addr = { htonl(INADDR_LOOPBACK) } };
		int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;

		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
		if (listens ? bind(fd, (void *)&a, sizeof a) || listen(fd, 64) :
		    connect(fd, (void *)&a, sizeof a))
			exit(1);
		return fd;
	}
	static void
	add(int fd, int i, int other)
	{
		int on = 1;

		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
		end[i].fd = fd;
		end[i].other = other;
		end[i].first = NULL;
		end[i].last = &end[i].first;
	}
	static void
	take(int i, double due)		/* what this end says, for the other */
	{
		struct piece *p = malloc(sizeof *p);
		ssize_t n = read(end[i].fd, p->b, sizeof p->b);
		int o = end[i].other;

		p->next = NULL;
		p->n = n > 0 ? n : 0;
		p->at = 0;
		p->due = due;
		*end[o].last = p;
		end[o].last = &p->next;
		if (n <= 0)
			end[i].other = -1;	/* not read again */
	}
	static void
	give(int i, double t)
	{
		struct piece *p;

		while ((p = end[i].first) && p->due <= t) {
			if (p->n && write(end[i].fd, p->b, p->n) < 0)
				end[i].other = -1;
			if (!p->n)
				shutdown(end[i].fd, SHUT_WR);
			end[i].first = p->next;
			if (!p->next)
				end[i].last = &end[i].first;
			free(p);
		}
	}
	int
	main(int argc, char **argv)
	{
		int from = place(atoi(argv[1]), 1), to = atoi(argv[2]), n = 0;
		double ms = atof(argv[3]), born[MOST] = { 0 };

		(void)argc;
		signal(SIGPIPE, SIG_IGN);
		for (;;) {
			struct pollfd p[MOST + 1] = { { from, POLLIN, 0 } };
			int log, wait = -1;
			double t = now();

			for (int i = 0; i < n; i++) {
				p[i + 1].fd = end[i].other < 0 ? -1 : end[i].fd;
				p[i + 1].events = POLLIN;
				if (end[i].first && (wait < 0 ||
				    end[i].first->due - t < wait))
					wait = end[i].first->due < t ? 0 :
					    end[i].first->due - t + 1;
			}
			poll(p, n + 1, wait);
			t = now();
			log = open(argv[4], O_WRONLY | O_APPEND | O_CREAT,
			    0666);
			if (p[0].revents) {
				/* Where all is over, begin again. */
				int over = 1;

				for (int i = 0; i < n; i++)
					over = over && end[i].other < 0 &&
					    !end[i].first;
				for (; over && n > 0; n--)
					close(end[n - 1].fd);
				if (n + 2 > MOST)
					exit(2);
				add(accept(from, NULL, NULL), n, n + 1);
				add(place(to, 0), n + 1, n);
				born[n] = t;
				n += 2;
				write(log, "C\n><\n", 5);
			}
			for (int i = 0; i < n; i++) {
				/* The first bytes follow a handshake of TCP. */
				if (p[i + 1].revents && p[i + 1].fd >= 0) {
					write(log, i % 2 ? "<\n" : ">\n", 2);
					take(i, t + ms + (i % 2 == 0 &&
					    t < born[i] + 2 * ms ? 2 * ms -
					    (t - born[i]) : 0));
				}
				give(i, t);
			}
			close(log);
		}
	}
	END
	for name in empty meter delay; do
		musl-gcc -std=gnu99 -Os -w -static -s -o "bin/$name" \
		    "$name.c" || exit
	done
	scripts
}

# memory COMMAND...: the most KiB that it had at any time.
memory() {
	bin/meter usage "$@" >/dev/null </dev/null && cut -d' ' -f1 usage
}

# ---------------------------------------------------------------- image --

# Two builds, as different as two people's, and what container tools say.
image() {
	check 'two builds give the same bytes' '
	    unset MAKEFLAGS SOURCE_DATE_EPOCH
	    made 022 here && made 077 else/where TZ=Asia/Tokyo &&
	    cmp here/acme-step else/where/acme-step &&
	    cmp here/acme-step.tar else/where/acme-step.tar'
	check 'its times are those of SOURCE_DATE_EPOCH' '
	    SOURCE_DATE_EPOCH=86399 pack_image "$acme" dated.tar &&
	    TZ=UTC0 tar tvf dated.tar >list && cat list &&
	    grep "1970-01-01 23:59" list >dated && diff list dated'
	mkdir bundle
	check 'skopeo reads it as what docker load takes' '
	    unpacked docker-archive:here/acme-step.tar'
	check 'and as what OCI tools take' '
	    unpacked oci-archive:here/acme-step.tar'
	check 'umoci unpacks it: the program and LICENSE' '
	    own=--rootless
	    [ "$(id -u)" != 0 ] || own=
	    mkdir layout && tar xf here/acme-step.tar -C layout &&
	    umoci unpack $own --image "layout:$(version)" bundle &&
	    find bundle/rootfs -mindepth 1 | sort >list && cat list &&
	    printf "bundle/rootfs/%s\n" LICENSE acme-step | diff - list &&
	    cmp "$src/LICENSE" bundle/rootfs/LICENSE &&
	    cmp here/acme-step bundle/rootfs/acme-step'
	check 'runc runs it' '
	    contained "\"version\"" >out && acme-step version | diff - out &&
	    contained "\"help\"" >out && acme-step help | diff - out'
	check 'and it makes a key in a directory of the host' '
	    contained "\"key\", \"-o\", \"/data/key.pem\"" &&
	    openssl pkey -in data/key.pem -noout -check &&
	    [ "$(stat -c %a data/key.pem)" = 600 ]'
	check 'its exit status comes through' '
	    contained "\"thumbprint\"" 2>err; got=$?; cat err; [ $got = 66 ]'
}

# made UMASK DIRECTORY [VARIABLE=VALUE]: build it there, from the source.
made() (
	umask "$1"
	mkdir -p "$2" && cd "$2" &&
	cp "$src/acme.c" "$src/Makefile" "$src/test.sh" "$src/LICENSE" . &&
	env ${3+"$3"} make image
)

version() {
	sed -n 's/^#define VERSION "\(.*\)"/\1/p' "$src/acme.c"
}

# unpacked IMAGE: skopeo checks all hashes of it; the layer has two files.
unpacked() {
	rm -rf copy
	skopeo inspect --config "$1" >config && cat config &&
	grep -q '"/acme-step"' config &&
	skopeo --insecure-policy copy "$1" dir:copy || return
	for file in copy/*; do
		tar tf "$file" 2>/dev/null
	done >list
	printf '%s\n' LICENSE acme-step | diff - list
}

# contained ARGUMENTS, in JSON: run the container with them, and with the
# directory data of ours as its /data.
contained() {
	mkdir -p data
	[ -e bundle/made.json ] || cp bundle/config.json bundle/made.json
	mounted="{\"destination\": \"/data\", \"type\": \"bind\",
	    \"source\": \"$tmp/data\", \"options\": [\"rbind\"]},"
	awk -v arguments="$1" -v mounted="$mounted" '
	    /"terminal":/		{ sub(/true/, "false") }
	    /^[ \t]*"\/acme-step"$/	{ $0 = $0 ", " arguments }
	    /"mounts": \[/		{ $0 = $0 mounted }
	    { print }' bundle/made.json >bundle/config.json
	runc --root "$tmp/runc" run --bundle bundle "acme-step-$$"
}

# ---------------------------------------------------------------- cross --

cross() {
	chmod 755 "$tmp"
	world_start
	pebble_start
	runs=''
	processors >processors
	while read -r cpu compiler emulator <&3; do
		group "$cpu"
		mkdir "$cpu"
		there=$cache/foreign/$cpu
		sed "s|/usr/|$there/usr/|g" "$there/specs" >"$cpu/specs"
		cc="$compiler-gcc -specs $tmp/$cpu/specs"
		check "$cpu: it builds, static and without a warning" built
		printf '#!/bin/sh\nexec %s %s "$@"\n' "qemu-$emulator-static" \
		    "$tmp/$cpu/made/acme-step" >"$cpu/acme-step"
		chmod +x "$cpu/acme-step"
		check "$cpu: a certificate from Pebble" issues
		CC="$cc -static -isystem $there/inc -L$there/build $(defsyms)" \
		    RUN="qemu-$emulator-static" sh "$src/test.sh" offline \
		    "$cpu/acme-step" >"$cpu/offline" 2>&1 &
		runs="$runs $!" pids="$pids $!"
	done 3<processors
	# shellcheck disable=SC2086	# one word a process
	wait $runs
	while read -r cpu _ <&3; do
		group "$cpu: the tests that need no network"
		awk -v n="$n" -v cpu="$cpu" '
		    /^(not )?ok /	{ sub(/[0-9]+ - /, ++n " - " cpu ": ") }
		    !/^[0-9]+ passed/	{ print }' "$cpu/offline"
		n=$((n + $(grep -c -e '^ok' -e '^not ok' "$cpu/offline")))
		bad=$((bad + $(grep -c '^not ok' "$cpu/offline")))
		check "$cpu: they came to their end" \
		    'tail -n 1 "$cpu/offline" | grep " passed, "'
	done 3<processors
	finish
}

# In the way that the README shows.
built() {
	mkdir "$cpu/made" && cd "$cpu/made" &&
	cp "$src/acme.c" "$src/Makefile" . && unset MAKEFLAGS &&
	make CC="$cc" BEARSSL="$there" >log 2>&1
	got=$?
	cat log
	[ "$got" = 0 ] && not grep warning log && static_pie acme-step
}

# static_pie FILE: it needs no other file, can be loaded anywhere, needs no
# loader for that but its start code (which knows one kind of relocation),
# and has what becomes read-only, but nothing writable and executable.
static_pie() {
	readelf -hlW "$1" >headers && readelf -dW "$1" >dynamic &&
	cat headers dynamic &&
	grep "Type: *DYN" headers && not grep INTERP headers &&
	not grep -e NEEDED -e TEXTREL dynamic &&
	readelf -rW "$1" | grep " R_" >relocations &&
	not grep -v RELATIVE relocations &&
	grep GNU_RELRO headers && grep "GNU_STACK.* RW " headers &&
	not grep " RWE " headers
}

issues() (
	PATH=$tmp/$cpu:$PATH
	cd "$cpu" && cp ../root.pem . &&
	acme-step key -o account.pem &&
	acme-step key -o leaf.pem &&
	acme-step new-account -y -o account &&
	acme-step new-order -a account "$cpu.test" 127.0.0.1 |
	acme-step respond -t http-01 -w "$www" |
	acme-step finalize -K leaf.pem -o chain.pem &&
	issued leaf.pem chain.pem "DNS:$cpu.test" 'IP Address:127.0.0.1'
)

defsyms() {
	sed -n 's/^.*\(-Wl,--defsym=[a-z_=]*\).*/\1/p' "$src/Makefile" |
	tr '\n' ' '
}

finish() {
	echo "$((n - bad)) passed, $bad failed"
	[ "$bad" = 0 ]
	exit
}

# ------------------------------------------------------------ initramfs --

# The machine sees the host's loopback at 10.0.2.2, and what asks the host
# for $web is sent to its port 80.
initramfs() {
	world_start
	web=$(free_port)
	pebble_start
	modules=$cache/machine/modules
	mkdir -p root/bin root/lib root/www/.well-known/acme-challenge
	cp "$acme" root/bin/acme-step
	cp "$cache/machine/busybox" root/bin
	cp ca.pem root
	cp -R "$modules" root/lib
	cat >root/init <<-EOF
	#!/bin/busybox sh
	/bin/busybox --install -s /bin
	mkdir /proc && mount -t proc none /proc
	depmod
	modprobe -a virtio_pci virtio_net
	ip link set eth0 up
	udhcpc -q -n -i eth0 -s /address
	httpd -h /www
	ACME_DIRECTORY=https://10.0.2.2:$pebble/dir ACME_CA_FILE=/ca.pem /issue
	poweroff -f
	EOF
	cat >root/address <<-'EOF'
	#!/bin/sh
	[ "$1" != bound ] || ip addr add "$ip/$mask" dev "$interface"
	EOF
	cat >root/issue <<-'EOF'
	#!/bin/sh
	acme-step key -o account.pem && acme-step key -o leaf.pem &&
	acme-step new-account -y -o account &&
	acme-step new-order -a account boot.test |
	acme-step respond -t http-01 -w /www/.well-known/acme-challenge |
	acme-step finalize -K leaf.pem
	echo "exit status $?"
	EOF
	chmod +x root/init root/address root/issue
	(cd root && find . | busybox cpio -o -H newc) >initramfs 2>>servers.log

	group 'a machine with a kernel, an init, busybox and acme-step'
	machine now -nic "user,model=virtio-net-pci,\
hostfwd=tcp:127.0.0.1:$web-:80" & now=$!
	machine 1970 -nic user,model=virtio-net-pci -rtc base=1970-01-01 &
	wait "$now" "$!"
	check 'it obtained a certificate' '
	    cat now && grep -x "exit status 0" now'
	check 'which is one' '
	    sed -n "/^-----BEGIN/,/^-----END/p" now >chain.pem &&
	    openssl verify -CAfile root.pem -untrusted chain.pem chain.pem &&
	    names_in chain.pem >names && echo DNS:boot.test | diff - names'
	check 'in 1970 it says what is wrong: the clock' '
	    cat 1970 && grep -x "exit status 78" 1970 &&
	    grep "^acme-step: new-account: .*clock" 1970'
	finish
}

# machine FILE OPTION...: boot one; what it says is written to the file,
# without the lines that are for a person who waits.
machine() {
	said=$1; shift
	timeout 300 qemu-system-x86_64 -m 256 -cpu max -no-reboot \
	    -display none -monitor none -serial stdio \
	    -kernel "$cache/machine/vmlinuz" -initrd initramfs \
	    -append 'console=ttyS0 quiet panic=-1' "$@" </dev/null 2>&1 |
	sed -e 's/\r$//' -e 's/.*\x1b\[K//' >"$said"
}

# ----------------------------------------------------------------- lint --

# What clang-tidy would complain of, and why that is no fault.
not_of_tidy() {
	cat <<-'EOF'
	bugprone-easily-swappable-parameters	C has no others
	bugprone-implicit-widening-of-multiplication-result	small numbers
	bugprone-macro-parentheses		"each" takes a member's name
	bugprone-not-null-terminated-result	a Str has a length
	bugprone-reserved-identifier		_POSIX_C_SOURCE and its like
	cert-dcl37-c				the same
	cert-dcl51-cpp				the same
	cert-err33-c				signal(), for signals that exist
	clang-analyzer-optin.performance.*	padding of three small structs
	EOF
}
# The same for shellcheck.
not_of_shellcheck() {
	cat <<-'EOF'
	SC2016	check evaluates its words
	SC2034	the same
	SC2317	the same
	SC2120	those words call functions with arguments
	SC2119	the same
	SC2059	the formats of printf are ours
	SC2030	some subshells have a PATH of their own
	SC2031	the same
	SC2086	options, one word each
	SC2094	a file is read before it is replaced
	SC2261	": >a >b" empties both
	EOF
}
# listed FUNCTION [PREFIX]: the first words of its lines.
listed() { "$1" | sed "s/[ 	].*//; s/^/${2-}/" | paste -s -d , -; }
lint() {
	group 'what other programs say of the source'
	inc='-std=c99 -isystem /usr/include/bearssl'
	check 'gcc -fanalyzer' '
	    gcc $inc -O1 -Wall -Wextra -fanalyzer -Werror -c "$src/acme.c" \
		-o /dev/null'
	check 'clang-tidy' '
	    clang-tidy --quiet --warnings-as-errors="*" "$src/acme.c" \
		--checks="-*,\
bugprone-*,cert-*,clang-analyzer-*,$(listed not_of_tidy -)" -- $inc'
	# Where a va_list ends, the step has ended.
	check 'cppcheck' '
	    cppcheck --quiet --std=c99 --error-exitcode=1 \
		-I /usr/include/bearssl --suppress=va_end_missing \
		--enable=warning,performance,portability "$src/acme.c"'
	check 'shellcheck' '
	    shellcheck -e "$(listed not_of_shellcheck)" "$src/test.sh" \
		"$src/.ci/run"'
	finish
}

# ----------------------------------------- old systems, and years to come --

# An old kernel lacks system calls (ENOSYS).  An old sandbox refuses those
# that it does not know (EPERM), even if the kernel has them; a C library
# then takes no other call in their place.
old() {
	[ "$(uname -m)" = x86_64 ] || give_up 'needs an x86-64 kernel'
	chmod 755 "$tmp"
	world_start
	pebble_start
	rm -r "$www"
	mkdir "$tmp/published"
	ln -s "$tmp/published" "$www"
	cp ca.pem root.pem published
	retired
	group 'programs for each processor'
	printf 'amd64\n' >processors
	processors >>processors
	offline='' native=amd64
	while read -r cpu compiler emulator <&3; do
		mkdir "$cpu"
		compiler_for "$cpu" "$compiler"
		check "$cpu: it builds" built_here
		check "$cpu: so do the tools" tools_for
		[ "$cpu" != i386 ] || here
		for list in $(tested "$cpu"); do
			stands "$list"
			offline_start "$list"
		done
	done 3<processors
	refusals
	old_issues
	years
	offline_end
	finish
}

# compiler_for PROCESSOR COMPILER: $cc and $there, as in cross.
compiler_for() {
	cc=musl-gcc there=
	[ "$1" != amd64 ] || return 0
	there=$cache/foreign/$1
	sed "s|/usr/|$there/usr/|g" "$there/specs" >"$1/specs"
	cc="$2-gcc -specs $tmp/$1/specs"
}

# The program as it is, and one whose clock is the variable CLOCK.  The
# kernel's vDSO answers without a system call: so no program here finds it;
# qemu has none.
built_here() {
	cat >"$cpu/clock.c" <<-'END'
	#include <stdlib.h>
	#include <time.h>
	int __real___clock_gettime(clockid_t, struct timespec *);
	int
	__wrap___clock_gettime(clockid_t id, struct timespec *t)
	{
		const char *set = getenv("CLOCK");
		int r = __real___clock_gettime(id, t);

		if (r == 0 && id == CLOCK_REALTIME && set)
			t->tv_sec = atoll(set);
		return r;
	}
	#define SAME __attribute__((alias("__wrap___clock_gettime")))
	SAME int __wrap_clock_gettime(clockid_t, struct timespec *);
	SAME int __wrap___clock_gettime64(clockid_t, struct timespec *);
	END
	cd "$cpu" && unset MAKEFLAGS && cp "$src/acme.c" "$src/Makefile" . &&
	make CC="$cc" BEARSSL="$there" && no_vdso acme-step now &&
	$cc -c clock.c && mv acme-step known &&
	make CC="$cc $PWD/clock.o -Wl,--wrap=clock_gettime \
-Wl,--wrap=__clock_gettime,--wrap=__clock_gettime64" BEARSSL="$there" &&
	no_vdso acme-step later
}
no_vdso() {
	sed s/__vdso_/__none_/g "$1" >"$2" && chmod +x "$2" || return
	case $cpu in
	amd64|i386)	not cmp "$1" "$2" ;;
	esac
}

# numbers NAME...: of system calls; a processor lacks some of them.
numbers() {
	for call; do
		printf '#ifdef __NR_%s\n__NR_%s,\n#endif\n' "$call" "$call"
	done
}

# What Docker 1.10 did not allow of the calls of its time; which of them, and
# which newer ones, Docker 19.03.8 allowed, and 19.03.9; and what gVisor has
# never had.  Of the calls above the last one of 2014, those of sockets are
# older on other processors than on i386.
retired() {
	numbers _sysctl acct add_key adjtimex afs_syscall bdflush bpf \
	    clock_adjtime clock_settime clock_settime32 \
	    create_module delete_module \
	    finit_module get_kernel_syms get_mempolicy init_module ioperm \
	    iopl ipc kcmp kexec_file_load kexec_load keyctl lookup_dcookie \
	    mbind migrate_pages modify_ldt mount move_pages \
	    name_to_handle_at nfsservctl open_by_handle_at perf_event_open \
	    personality pivot_root process_vm_readv process_vm_writev ptrace \
	    query_module quotactl reboot request_key restart_syscall \
	    set_mempolicy setns settimeofday settimeofday_time32 \
	    sigprocmask socketcall stime \
	    swapoff swapon sysfs umount umount2 unshare uselib ustat vm86 \
	    vm86old vserver waitpid >docker.h
	numbers accept4 adjtimex bind connect copy_file_range getpeername \
	    getsockname getsockopt io_pgetevents ipc listen mlock2 preadv2 \
	    pwritev2 recv recvfrom recvmsg restart_syscall send sendmsg \
	    sendto setsockopt shutdown sigprocmask socket socketcall \
	    socketpair statx waitpid >docker-19.03.8.h
	numbers clock_getres_time64 clock_gettime64 clock_nanosleep_time64 \
	    futex_time64 io_pgetevents_time64 mq_timedreceive_time64 \
	    mq_timedsend_time64 ppoll_time64 pselect6_time64 \
	    recvmmsg_time64 rt_sigtimedwait_time64 \
	    sched_rr_get_interval_time64 semtimedop_time64 timer_gettime64 \
	    timer_settime64 timerfd_gettime64 timerfd_settime64 \
	    utimensat_time64 | cat docker-19.03.8.h - >docker-19.03.9.h
	numbers _sysctl epoll_ctl_old epoll_wait_old fanotify_init \
	    fanotify_mark io_pgetevents modify_ldt mq_getsetattr mq_notify \
	    mq_open mq_timedreceive mq_timedsend mq_unlink name_to_handle_at \
	    open_by_handle_at perf_event_open process_vm_readv \
	    process_vm_writev renameat2 setfsgid setfsuid sysfs tee \
	    userfaultfd ustat vmsplice >gvisor.h
	# refuse LIST COMMAND...: run it without the calls of the list, in the
	# directory ROOT, if that is set.
	cat >refuse.c <<-'END'
	#include <errno.h>
	#include <linux/filter.h>
	#include <linux/seccomp.h>
	#include <stddef.h>
	#include <stdio.h>
	#include <stdlib.h>
	#include <string.h>
	#include <sys/prctl.h>
	#include <sys/syscall.h>
	#include <unistd.h>
	static const int none[] = { -1 };
	static const int docker[] = {
	#include "docker.h"
		-1
	};
	static const int docker_19_03_8[] = {
	#include "docker-19.03.8.h"
		-1
	};
	static const int docker_19_03_9[] = {
	#include "docker-19.03.9.h"
		-1
	};
	static const int gvisor[] = {
	#include "gvisor.h"
		-1
	};
	static const struct list {
		const char *name;
		int error, last;	/* none above that number */
		const int *allowed, *refused;
	} lists[] = {
		{ "linux-3.2", ENOSYS, __NR_process_vm_writev, none, none },
		{ "docker-1.10", EPERM, __NR_execveat, none, docker },
		{ "docker-19.03.8", EPERM, __NR_execveat, docker_19_03_8,
		    docker },
		{ "docker-19.03.9", EPERM, __NR_execveat, docker_19_03_9,
		    docker },
		{ "gvisor", ENOSYS, __NR_mlock2, none, gvisor },
	};
	static struct sock_filter filter[512];
	static unsigned short n;
	static void
	add(int code, unsigned k, int otherwise)
	{
		filter[n++] = (struct sock_filter){ (unsigned short)code, 0,
		    (unsigned char)otherwise, k };
	}
	static void
	each(const int *number, unsigned result)
	{
		for (; *number >= 0; number++) {
			add(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)*number, 1);
			add(BPF_RET | BPF_K, result, 0);
		}
	}
	int
	main(int argc, char **argv)
	{
		const struct list *l = lists;
		struct sock_fprog p = { 0, filter };
		const char *root = getenv("ROOT");
		unsigned refused;

		if (argc < 3)
			return 125;
		while (strcmp(l->name, argv[1]) != 0)
			if (++l == lists + sizeof lists / sizeof *lists)
				return 125;
		refused = SECCOMP_RET_ERRNO | (unsigned)l->error;
		add(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr),
		    0);
		each(l->allowed, SECCOMP_RET_ALLOW);
		each(l->refused, refused);
		add(BPF_JMP | BPF_JGT | BPF_K, (unsigned)l->last, 1);
		add(BPF_RET | BPF_K, refused, 0);
		add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0);
		p.len = n;
		if ((root && (chroot(root) || chdir("/"))) ||
		    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
		    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p)) {
			perror("refuse");
			return 125;
		}
		unsetenv("ROOT");
		execvp(argv[2], argv + 2);
		perror(argv[2]);
		return 127;
	}
	END
	# probe: what the system says to some calls.
	cat >probe.c <<-'END'
	#include <errno.h>
	#include <stdio.h>
	#include <sys/syscall.h>
	#include <unistd.h>
	static char b[16];
	#define SAY(name, ...) errno = 0; \
		syscall(__NR_##name, __VA_ARGS__); \
		printf(#name ": %s\n", errno == ENOSYS ? "lacking" : \
		    errno == EPERM ? "refused" : "there")
	int
	main(void)
	{
		SAY(getpid, 0);
		SAY(setns, -1, 0);
		SAY(getrandom, b, sizeof b, 0);
		SAY(statx, -1, b, 0, 0, b);
	#ifdef __NR_clock_gettime64
		SAY(clock_gettime64, -1, b);
	#endif
		return 0;
	}
	END
}

# here: do programs of $cpu run here without qemu?  If they do not, the lists
# of calls are not tried with them.
here() {
	check "$cpu: the kernel runs its programs (CONFIG_IA32_EMULATION)" '
	    "$cpu/probe"'
	! "$cpu/probe" >probe.out 2>&1 || native="$native $cpu"
}
is_native() {
	case " $native " in
	*" $cpu "*)	;;
	*)		false ;;
	esac
}

# The tools for $cpu; refuse, if its programs can run here without qemu.
tools_for() {
	headers="-idirafter /usr/include \
-idirafter /usr/include/$(cc -print-multiarch)"
	cd "$cpu" && $cc -w -static -o probe ../probe.c || return
	case $cpu in
	amd64|i386)
		$cc -w -static $headers -o refuse ../refuse.c ;;
	esac
}

# runs LIST PROGRAM: the words that run a program of $cpu without the calls.
# Those of another processor run in qemu, which makes their calls.  Without
# getrandom() it would read random bytes for RDRAND from a descriptor of its
# own, which respond -l closes, as it does all that are not its own.
runs() {
	if is_native; then
		echo "$tmp/$cpu/refuse $1 $2"
	else
		set -- "$1" "-r 3.2.0 $2"
		[ "$cpu" != i386 ] || set -- "$1" "-cpu max,-rdrand $2"
		echo "$tmp/amd64/refuse $1" \
		    "$(command -v "qemu-$emulator-static") $2"
	fi
}

refusals() {
	group 'calls that are refused'
	while read -r cpu compiler emulator <&3; do
		if ! is_native; then
			check "$cpu: through qemu, too" '
			    $(runs linux-3.2 "$cpu/probe") >out && cat out &&
			    grep -x "getrandom: lacking" out'
			continue
		fi
		refused linux-3.2 lacking lacking there
		refused gvisor lacking there there
		refused docker-1.10 refused there refused
		refused docker-19.03.8 refused there refused
		refused docker-19.03.9 there there refused
	done 3<processors
}

# refused LIST TIME64 GETRANDOM SETNS: what the list makes of these calls.
# The first one is also what becomes of statx, which Docker 19.03.8 allows.
refused() {
	list=$1 time64=$2 getrandom=$3 setns=$4
	check "$cpu, $list: what it refuses is refused" '
	    statx=$time64
	    [ "$list" != docker-19.03.8 ] || statx=there
	    printf "%s: %s\n" getpid there setns "$setns" \
		getrandom "$getrandom" statx "$statx" >want
	    [ "$cpu" = amd64 ] || echo "clock_gettime64: $time64" >>want
	    $(runs "$list" "$cpu/probe") >out && diff want out'
}

# stands LIST [DIRECTORY]: a directory, named $cpu-LIST, with an acme-step
# that runs without these calls.
stands() {
	where=$cpu-$1
	mkdir "$where"
	printf '#!/bin/sh\nexec %s "$@"\n' "$(runs "$1" "$tmp/$cpu/now")" \
	    >"$where/acme-step"
	chmod +x "$where/acme-step"
}

old_issues() {
	group 'certificates from Pebble'
	while read -r cpu compiler emulator <&3; do
		lives linux-3.2
	done 3<processors
	cpu=amd64
	lives docker-1.10
	lives docker-19.03.8
	cpu=i386
	if is_native; then
		lives docker-19.03.9
		without_time
	fi
	cpu=amd64
	jails
}

# lives LIST
lives() {
	where=$cpu-$1
	[ -d "$where" ] || stands "$1"
	check "$cpu, $1: each step of a certificate's life" '
	    cd "$where" && cp ../root.pem ../ca.pem . && life'
}

# Before 19.03.9 Docker refused what 32-bit programs of musl read the clock
# and the modes of files by; a kernel's vDSO reads the clock without a call.
without_time() {
	refused=$tmp/i386/refuse
	check 'i386, docker-19.03.8: a kernel with a vDSO' '
	    cp -r i386-docker-19.03.9 i386-vdso && cd i386-vdso && rm *.pem &&
	    cp ../root.pem ../ca.pem . && where=i386-vdso &&
	    printf "#!/bin/sh\nexec %s docker-19.03.8 %s \"\$@\"\n" \
		"$refused" "$tmp/i386/known" >acme-step && life'
	dies 70 'cannot read the clock: Operation not permitted' '
	    $refused docker-19.03.8 i386/now due \
		i386-docker-19.03.9/chain.pem'
	dies 70 'cannot read the clock: Operation not permitted' '
	    $refused docker-19.03.8 i386/now directory'
	dies 73 'cannot create none.pem' '
	    $refused docker-1.10 i386/known key -o none.pem'
	check 'and there is no key then' '[ ! -e none.pem ]'
}

# Without /proc, /sys, /dev and /etc, and alone in its directory.
jails() {
	mkdir jail
	mv published jail
	ln -s jail/published published
	cp amd64/now jail/program
	cp root.pem ca.pem jail
	cat >jail/acme-step <<-EOF
	#!/bin/sh
	ROOT=$tmp/jail exec $tmp/amd64/refuse \$list /program "\$@"
	EOF
	chmod +x jail/acme-step
	check 'gVisor: each step, without a /proc, a /dev and an /etc' '
	    cd jail && list=gvisor where=jail jail= ACME_CA_FILE=ca.pem \
		ACME_RESOLVE="localhost:$pebble:127.0.0.1" &&
	    export list ACME_CA_FILE ACME_RESOLVE && life'
	check 'Linux 3.2: randomness comes from /dev/urandom' '
	    cd jail && list=linux-3.2 && export list && mkdir dev &&
	    mknod -m 666 dev/urandom c 1 9 && ./acme-step key -o dev.pem &&
	    ./acme-step key -o other.pem && not cmp dev.pem other.pem &&
	    openssl pkey -in dev.pem -noout -check && rm dev/urandom'
	rm -f jail/dev/urandom
	dies 70 'cannot get random bytes from the system: No such file' '
	    cd jail && list=linux-3.2 ./acme-step key -o none.pem'
	check 'and there is no key then' '[ ! -e jail/none.pem ]'
}

# life: of a certificate and of its account, in this directory, with the
# acme-step that is in it.  Names are $where.test and 127.0.0.1.
life() (
	PATH=$PWD:$PATH
	set -- "$where.test" 127.0.0.1
	acme-step key -o account.pem &&
	acme-step key -t ec384 -o leaf.pem &&
	acme-step key -o next.pem && not cmp account.pem next.pem &&
	acme-step new-account -y -m mailto:ops@example.com -o account &&
	acme-step new-order -a account "$@" |
	acme-step respond -t http-01 -w "${jail-$tmp/}published" |
	acme-step finalize -K leaf.pem -o chain.pem &&
	issued leaf.pem chain.pem "DNS:$1" "IP Address:$2" &&
	acme-step csr -K leaf.pem "$@" >csr.pem &&
	acme-step new-order -a account -R chain.pem -r csr.pem >order &&
	acme-step challenges -t tls-alpn-01 <order |
	acme-step respond -l "127.0.0.1:$tls" |
	acme-step finalize -r csr.pem -o chain.pem &&
	issued leaf.pem chain.pem "DNS:$1" "IP Address:$2" &&
	answers acme-step due -K leaf.pem chain.pem "$@" &&
	answers acme-step renewal-info -a account chain.pem &&
	acme-step key-change -a account -K next.pem >account.new &&
	acme-step revoke-cert -k next.pem -a account chain.pem &&
	status_of chain.pem | grep Revoked
)

# answers COMMAND...: no, or what $answer says.
answers() {
	"$@"
	[ $? = "${answer-1}" ]
}

# plainly: the words that run the program whose clock is CLOCK.
plainly() {
	is_native || printf '%s ' "qemu-$emulator-static"
	echo "$tmp/$cpu/later"
}

years() {
	dated_servers
	while read -r cpu compiler emulator <&3; do
		group "$cpu: after 2038"
		run=$(plainly)
		while read -r server clock answer; do
			check "$cpu: $server, and the clock is at $clock" \
			    at_clock
		done <clocks
		while read -r server clock answer; do
			check "$cpu: due at $clock, $answer: $server" due_at
		done <dues
		for clock in 2040-06-01 2107-03-01 9999-12-01; do
			check "$cpu: Retry-After and a window after $clock" \
			    window_at
		done
	done 3<processors
	dated_issues
}

# seconds TIME: since 1970.
seconds() { date -u -d "$1" +%s; }
# rfc3339 SECONDS
rfc3339() { date -u -d "@$1" +%Y-%m-%dT%H:%M:%SZ; }

# Servers of openssl, whose certificates have these lives, and what is said
# when the clock shows these times: yes, before or after.  The first one ends
# with 32-bit numbers, and begins with those that have no sign.
dated_servers() {
	cat >dated.cnf <<-'END'
	[ca]
	default_ca = ca
	[ca]
	database = dated.index
	new_certs_dir = .
	rand_serial = yes
	default_md = sha256
	policy = policy
	[policy]
	commonName = optional
	END
	echo authorityKeyIdentifier=keyid | cat server.ext - >dated.ext
	port_2106=$(free_port)
	dated_server 2106 20380119031408Z 21060207062815Z
	port_9999=$(free_port)
	dated_server 9999 20500101000000Z 99991231235959Z
	cat >clocks <<-'END'
	2106 2038-01-19T03:14:07Z before
	2106 2038-01-19T03:14:08Z yes
	2106 2040-02-29T12:00:00Z yes
	2106 2105-12-31T23:59:59Z yes
	2106 2106-02-07T06:28:15Z yes
	2106 2106-02-07T06:28:16Z after
	9999 2049-12-31T23:59:59Z before
	9999 2050-01-01T00:00:00Z yes
	9999 2106-02-07T06:28:16Z yes
	9999 9999-12-30T00:00:00Z yes
	9999 9999-12-31T23:59:59Z yes
	END
	dated 2039 20380101000000Z 20390401000000Z
	dated 2107 21070101000000Z 21070401000000Z
	cat >dues <<-'END'
	2039 2037-12-31T00:00:00Z early
	2039 2038-02-01T00:00:00Z no
	2039 2039-01-01T00:00:00Z yes
	2039 2039-04-01T00:00:01Z after
	2107 2107-01-02T00:00:00Z no
	2107 2107-03-30T00:00:00Z yes
	2106 2040-01-01T00:00:00Z no
	2106 2106-01-01T00:00:00Z yes
	9999 9000-01-01T00:00:00Z yes
	9999 2107-01-01T00:00:00Z no
	END
}

# dated NAME START END: a certificate with this life, NAME.pem.
dated() {
	: >dated.index
	openssl ca -batch -notext -config dated.cnf -extfile dated.ext \
	    -cert ca.pem -keyfile ca.key -in server.csr -out "$1.pem" \
	    -startdate "$2" -enddate "$3" 2>>servers.log ||
	    give_up "$(cat servers.log)"
}

dated_server() {
	dated "$@"
	eval "port=\$port_$1"
	mkdir "$1"
	printf 'HTTP/1.1 200 OK\r\n%s\r\n%s\r\n\r\n%s\n' \
	    'Content-Type: application/json' 'Connection: close' "{
	    \"newNonce\": \"https://localhost:$port/nonce\",
	    \"newAccount\": \"https://localhost:$port/account\",
	    \"newOrder\": \"https://localhost:$port/order\",
	    \"renewalInfo\": \"https://localhost:$port/ari\" }" >"$1/dir"
	mkdir "$1/ari"
	(cd "$1" && exec openssl s_server -HTTP -quiet -cert "../$1.pem" \
	    -key ../server.key -accept "127.0.0.1:$port") >>servers.log 2>&1 &
	pids="$pids $!"
	up "$port"
}

# at_clock: $run accepts the server, or names what is wrong with it.
at_clock() {
	eval "port=\$port_$server"
	[ "$(rfc3339 "$(seconds "$clock")")" = "$clock" ] || return
	CLOCK=$(seconds "$clock") $run directory \
	    -d "https://localhost:$port/dir" >out 2>err
	got=$?
	cat out err
	case $answer in
	yes)	[ $got = 0 ] && grep "^new-nonce https://localhost:$port" out &&
		    [ ! -s err ] && return ;;
	before)	end=-startdate words='is not valid before' ;;
	after)	end=-enddate words='expired at' ;;
	esac
	[ "$answer" != yes ] && [ $got = 78 ] &&
	    grep "$words $(life_end) (the clock here shows $clock)" err
}

# life_end: the one called $end of the certificate, by openssl and date.
life_end() {
	rfc3339 "$(seconds "$(openssl x509 -in "$server.pem" -noout "$end" |
	    cut -d = -f 2)")"
}

# due_at: what $run says of a certificate, which lives long.
due_at() {
	not_before=$(end=-startdate life_end) not_after=$(end=-enddate life_end)
	from=$(seconds "$not_before") to=$(seconds "$not_after")
	CLOCK=$(seconds "$clock") $run due "$server.pem" >out 2>err
	got=$?
	echo "exit status $got"
	cat out err
	renewal="is valid until $not_after, to be renewed from $(
	    rfc3339 $((to - (to - from) / 3)))"
	case $answer in
	early)	want="not due: $server.pem is not valid before $not_before" ;;
	no)	want="not due: $server.pem $renewal" ;;
	yes)	want="due: $server.pem $renewal" ;;
	after)	want="due: $server.pem expired at $not_after" ;;
	esac
	case $answer in
	yes|after)	[ $got = 0 ] ;;
	*)		[ $got = 1 ] ;;
	esac && [ ! -s err ] && grep "^$want" out
}

# window_at: the CA's window begins a day after $clock, and it wants to be
# asked again an hour later.
window_at() {
	server=9999 port=$port_9999
	[ "${clock%%-*}" -gt 2105 ] || server=2106 port=$port_2106
	CLOCK=$(seconds "$clock")
	export CLOCK
	start=$(rfc3339 $((CLOCK + 86400))) end=$(rfc3339 $((CLOCK + 172800)))
	again=$(LC_ALL=C date -u -d "@$((CLOCK + 3600))" \
	    '+%a, %d %b %Y %H:%M:%S GMT')
	printf 'HTTP/1.1 200 OK\r\n%s\r\n%s\r\n%s\r\n\r\n%s\n' \
	    'Content-Type: application/json' "Retry-After: $again" \
	    'Connection: close' "{ \"suggestedWindow\": {
	    \"start\": \"$start\", \"end\": \"$end\" } }" \
	    >"$server/ari/$(ari_name)" || return
	$run renewal-info -d "https://localhost:$port/dir" "$server.pem" >out
	got=$?
	cat out
	moment=$(field moment out)
	[ $got = 1 ] && grep -x "window $start $end" out &&
	    grep -x 'retry-after 3600' out &&
	    [ "$(seconds "$moment")" -ge $((CLOCK + 86400)) ] &&
	    [ "$(seconds "$moment")" -lt $((CLOCK + 172800)) ] || return
	CLOCK=$(seconds "$moment") $run renewal-info \
	    -d "https://localhost:$port/dir" "$server.pem" >out &&
	grep -x "moment $moment" out
}

# ari_name: of the certificate (RFC 9773 4.1).
ari_name() {
	key_id=$(openssl x509 -in "$server.pem" -noout \
	    -ext authorityKeyIdentifier | sed -n '2s/[ :]//gp')
	serial=$(openssl x509 -in "$server.pem" -noout -serial | cut -d = -f 2)
	case $serial in [89A-F]*) serial=00$serial ;; esac
	echo "$(echo "$key_id" | xxd -r -p | base64url).$(
	    echo "$serial" | xxd -r -p | base64url)"
}

# Pebble lives today, and its certificate lives until 9999.
dated_issues() {
	group 'certificates from Pebble on the last day but one of 9999'
	pebble_stop
	dated server 20200101000000Z 99991231235959Z
	pebble_start
	while read -r cpu compiler emulator <&3; do
		check "$cpu: each step of a certificate's life" '
		    where=$cpu-9999 && mkdir "$where" && cd "$where" &&
		    cp ../root.pem ../ca.pem . &&
		    printf "#!/bin/sh\nCLOCK=%s exec %s \"\$@\"\n" \
			"$(seconds 9999-12-30)" "$(plainly)" >acme-step &&
		    chmod +x acme-step && answer=0 life'
	done 3<processors
}

# tested PROCESSOR: the lists for which the tests without a network run.
tested() {
	case $1 in
	amd64)	echo linux-3.2 docker-1.10 gvisor ;;
	i386)	! is_native || echo linux-3.2 docker-19.03.9 ;;
	esac
}

# offline_start LIST: the tests that need no network, without these calls.
offline_start() {
	case $cpu in
	amd64)	CC=cc ;;
	*)	CC="$cc -static -isystem $there/inc -L$there/build"
		CC="$CC $(defsyms)" ;;
	esac
	export CC
	RUN="$tmp/$cpu/refuse $1" sh "$src/test.sh" offline \
	    "$cpu-$1/acme-step" >"$cpu-$1/offline" 2>&1 &
	unset CC
	pids="$pids $!"
	offline="$offline $cpu-$1:$!"
}

# offline_end: what they found.
offline_end() {
	for run in $offline; do
		wait "${run#*:}"
		run=${run%:*}
		group "$run: the tests that need no network"
		awk -v n="$n" -v run="$run" '
		    /^(not )?ok /	{ sub(/[0-9]+ - /, ++n " - " run ": ") }
		    !/^[0-9]+ passed/	{ print }' "$run/offline"
		n=$((n + $(grep -c -e '^ok' -e '^not ok' "$run/offline")))
		bad=$((bad + $(grep -c '^not ok' "$run/offline")))
		check "$run: they came to their end" \
		    'tail -n 1 "$run/offline" | grep " passed, "'
	done
}

# --------------------------------------------------------------- builds --

# What the README says of other compilers; clang has no option -specs.
builds() {
	chmod 755 "$tmp"
	world_start
	pebble_start
	mkdir work published
	rm -r "$www"
	ln -s "$tmp/published" "$www"
	musl=x86_64-linux-musl
	clang="clang -nostdlibinc -isystem /usr/include/$musl -L/usr/lib/$musl"
	offline=''
	for release in bookworm trixie; do
		group "$release: the compilers"
		plain musl-gcc musl-gcc
		plain clang "$clang"
		plain gcc-glibc gcc LDFLAGS=
		plain clang-glibc clang LDFLAGS=
		group "$release: optimizations"
		for level in 0 1 2 3 s z; do
			for compiler in musl-gcc "$clang"; do
				optimized
			done
			optimized LDFLAGS= gcc
			optimized LDFLAGS= clang
		done
		group "$release: the same bytes"
		reproduced
		group "$release: a source tree of BearSSL"
		cp -r "$cache/bearssl" work/bearssl
		plain tree musl-gcc BEARSSL=../bearssl
		rm -rf work/bearssl
	done
	cp -r "$cache/bearssl" work/bearssl
	plain tree-clang "$clang -Wno-unused-command-line-argument" \
	    BEARSSL=../bearssl
	offline_end
	finish
}

# within COMMAND...: in this release, where work is /mnt.  The name of the
# machine is another one if $machine is set.
within() {
	unshare -m -u sh -c '
	    [ ! "$machine" ] || hostname "$machine" || exit
	    mount --bind /proc "$1/proc" && mount --bind "$2" "$1/mnt" &&
	    mount -t tmpfs -o mode=1777 none "$1/dev/shm" &&
	    shift 2 && exec chroot "$root" "$@"' \
	    sh "$root" "$tmp/work" "$@"
}

# build DIRECTORY ARGUMENT...: by make, with these, in this release.
build() {
	root=$cache/debian/$release where=$1; shift
	export root
	rm -rf "work/$where"
	mkdir "work/$where" &&
	cp "$src/acme.c" "$src/Makefile" "work/$where" || return
	# shellcheck disable=SC2016	# expanded there
	(unset MAKEFLAGS && within sh -c 'cd "/mnt/$1" && shift && make "$@"' \
	    sh "$where" "$@") >make.log 2>&1
	got=$?
	cat make.log
	[ "$got" = 0 ] && not grep -i warning make.log
}

# plain NAME COMPILER [ARGUMENT]: as the README has it; what comes of it is
# tested.
plain() {
	where=$release-$1 compiler=$2 option=${3-}
	check "$where: it builds without a warning, and runs" '
	    build "$where" CC="$compiler" $option && cd "work/$where" &&
	    runs_there'
	[ -x "work/$where/acme-step" ] || return
	echo "# $(wc -c <"work/$where/acme-step") bytes"
	case $where in
	*-glibc)	return ;;
	esac
	check "$where: static, and a PIE" 'static_pie "work/$where/acme-step"'
	case $where in
	*-musl-gcc)
		check "$where: of at most 300,000 bytes" '
		    [ "$(wc -c <"work/$where/acme-step")" -le 300000 ]' ;;
	esac
	mkdir "$where"
	cp "work/$where/acme-step" "$where"
	check "$where: each step of a certificate's life" '
	    cd "$where" && cp ../root.pem ../ca.pem . && life'
	sh "$src/test.sh" offline "$where/acme-step" >"$where/offline" 2>&1 &
	pids="$pids $!"
	offline="$offline $where:$!"
}

# runs_there: in the release, and for a static program here.
runs_there() {
	version=$(version)
	within "/mnt/$where/acme-step" version >out && cat out &&
	grep "^acme-step $version (BearSSL" out &&
	within "/mnt/$where/acme-step" help >out && grep new-order out
}

optimized() {
	option=
	[ $# = 0 ] || { option=$1 compiler=$2; }
	check "$release, -O$level: ${compiler%% *} $option" '
	    build optimized CC="$compiler" CFLAGS="-O$level" $option &&
	    cd work/optimized && where=optimized && runs_there'
}

# Two people build: their directories, users, umasks, locales, time zones,
# clocks, hosts and the dates of their files differ.
reproduced() {
	check 'two people build the program and its image' '
	    person one root 022 C 2026-11-28T00:00:00 UTC0 &&
	    machine=elsewhere person two/of/them nobody 077 tr_TR.UTF-8 \
		2031-05-06T07:08:09 Asia/Tokyo'
	check 'who are two, indeed' '
	    diff work/one/person work/two/of/them/person >differences
	    cat differences && [ "$(grep -c "^>" differences)" = 5 ]'
	check 'the programs are the same' '
	    cmp work/one/acme-step work/two/of/them/acme-step'
	check 'and so are the images' '
	    cmp work/one/acme-step.tar work/two/of/them/acme-step.tar'
}

# person DIRECTORY USER UMASK LOCALE TIME ZONE: what each of them does.
person() {
	root=$cache/debian/$release
	export root
	rm -rf "work/${1%%/*}"
	mkdir -p "work/$1" &&
	cp "$src/acme.c" "$src/Makefile" "$src/test.sh" "$src/LICENSE" \
	    "work/$1" &&
	touch -d "$5" "work/$1"/* && chown -R "$2" "work/$1" &&
	within env -i PATH="$PATH" HOME=/ LC_ALL="$4" TZ="$6" \
	    setpriv --reuid="$2" --clear-groups faketime "$5" sh -c '
	    umask "$2" && cd "/mnt/$1" &&
	    { id -un; umask; locale 2>&1 | grep -e CTYPE -e ^locale; hostname
	      date +%Y:%Z; } >person && make image' sh "$1" "$3"
}

# --------------------------------------------------------------- faults --

# Each step of an issuance runs with a fault at one of its system calls, or at
# one byte of what the CA sends.  Then it runs again, followed by all steps
# that lead to a certificate.  Faults of bytes cut the connection, let it
# stall or change a bit: CUT, STALL and CORRUPT those of TLS, TRUNCATE and
# REWRITE those of HTTP inside it.
#
# The environment selects the runs.  FAULTS=all: each fault of each call, and
# of one byte in FAULTS_BYTES (32).  FAULTS=REGEX: those whose line "STEP
# PROCESS CALL NAME FAULT" or "STEP 0 BYTE byte FAULT" matches.  Without it
# they are chosen at random, with FAULTS_SEED, for FAULTS_SECONDS (120).
#
# new-order-out writes to standard output, replace over an old chain; pipe-1,
# pipe-2 and pipe-3 are the three steps of a pipeline; box, send and unbox are
# a step that writes requests, send, and the step that reads the responses.
faulty_steps='key new-account new-order new-order-out challenges respond-w
    respond-l respond-x respond-certbot finalize replace key-change box send
    unbox renewal-info revoke-cert pipe-1 pipe-2 pipe-3'
fault_kinds='SIGKILL SIGTERM ENOSPC EIO EINTR ENOMEM EMFILE EAGAIN
    CUT STALL CORRUPT TRUNCATE REWRITE'

faults() {
	[ "$(uname -m)" = x86_64 ] ||
	    give_up 'faults: its tool knows the registers of x86-64 alone'
	fault_tool
	relay_tool
	tools=$tmp
	seconds=${FAULTS_SECONDS:-120}
	[ -z "${FAULTS-}" ] || seconds=1000000
	seed=${FAULTS_SEED:-$(od -An -N3 -tu4 /dev/urandom | tr -d ' ')}
	workers=
	for world in world.1 world.2; do
		fault_worker </dev/null >"$world.log" 2>&1 &
		workers="$workers $!" pids="$pids $!"
		until [ -e "$world/calls" ]; do
			kill -0 "$!" 2>/dev/null ||
			    give_up "$(cat "$world.log")"
			sleep 0.2
		done
	done
	fault_list >faults.all
	awk '{ print >("world." NR % 2 + 1 "/faults.new") }' faults.all
	for world in world.1 world.2; do
		: >>"$world/faults.new"
		mv "$world/faults.new" "$world/faults"
	done
	# shellcheck disable=SC2086	# one word a process
	wait $workers
	fault_checks
	fault_table
	finish
}

# Of all calls and faults, a line for each that is wanted, in random order.
fault_list() {
	cat world.*/calls | sort -u |
	awk -v seed="$seed" -v wanted="${FAULTS-}" '
	BEGIN { srand(seed) }
	{
		for (i = 5; i <= NF; i++) {
			job = $1 " " $2 " " $3 " " $4 " " $i
			if (wanted == "" || wanted == "all" || job ~ wanted)
				print rand(), job
		}
	}' | sort | cut -d ' ' -f 2-
}

fault_checks() {
	group 'system calls that fail, and signals at them'
	cat world.*/results >results
	cat world.*/wrong >wrong
	echo "# $(grep -c . results) runs of $(grep -c . faults.all)," \
	    "FAULTS_SEED=$seed"
	for world in world.1 world.2; do
		check "$world did its runs" 'cat "$world.log"
		    [ -e "$world/finished" ]'
	done
	check 'the tool knows the errors of each call' '
	    not grep unknown- world.*/calls'
	for step in $faulty_steps; do
		for kind in $fault_kinds; do
			runs=$(grep -c "^$step [0-9 ]*[^ ]* $kind " results)
			[ "$runs" = 0 ] || check "$step, $kind: $runs run(s)" '
			    sed -n "/^$step [0-9]* [0-9]* [^ ]* $kind:/,/^$/p" \
				wrong >these; cat these; [ ! -s these ]'
		done
	done
}

# A row for each step and fault: in how many runs the step was done, failed
# as it should, had ended before that call, or did something wrong.
fault_table() {
	printf '\n%-15s %-7s %6s %6s %6s %6s %6s\n' step fault runs \
	    'done' failed missed wrong
	awk '
	BEGIN	{ split("done failed missed wrong", outcome) }
		{ n[$1 " " $5 " " $6]++; n[$6]++; key[$1 " " $5] }
	function row(name, fault, at) {
		all = 0
		for (i = 1; i <= 4; i++)
			all += n[at outcome[i]]
		printf "%-15s %-7s %6d %6d %6d %6d %6d\n", name, fault, all,
		    n[at "done"], n[at "failed"], n[at "missed"],
		    n[at "wrong"]
	}
	END {
		for (k in key) {
			split(k, word)
			row(word[1], word[2], k " ")
		}
		row("~", "", "")
	}' results | sort | sed 's/^~  /all/'
}

# fault_worker: a process of its own, with the directory $world, a CA and
# ports of its own: count the calls of each step, await the list of runs and do
# them.
fault_worker() {
	pids='' pebble_pids=''
	trap 'kill $pids $pebble_pids; wait' EXIT
	trap 'exit 143' TERM
	mkdir "$world" && cd "$world" && tmp=$PWD serial=0 || exit
	world_start
	retry_after=0
	pebble_start PEBBLE_WFE_NONCEREJECT=0
	ACME_TIMEOUT=20
	export www
	relays_start
	mkdir kept && : >results && : >wrong && fault_hooks && cd kept &&
	for key in account leaf; do
		acme-step key -o "$key.pem" || exit
	done &&
	acme-step new-account -y -o account && name=old.test && whole_way &&
	mv chain.pem ../old.pem && cd .. &&
	public=$(openssl pkey -in kept/leaf.pem -pubout) || exit
	for step in $faulty_steps; do
		fault_count || exit
	done
	mv calls.new calls
	until [ -e faults ]; do sleep 0.1; done
	end=$(($(date +%s) + seconds))
	while read -r step process call what kind; do
		[ "$(date +%s)" -lt "$end" ] || break
		fault_run || exit
	done <faults
	: >finished
	exit
}

# relays_start: what takes HTTP out of TLS, for the relay, and puts it back.
# The step finds the relay at 127.0.0.2 and the first of these at 127.0.0.3.
relays_start() {
	inner=$(free_port)
	outer=$(free_port)
	server_start socat "OPENSSL-LISTEN:$pebble,bind=127.0.0.3,fork,\
reuseaddr,verify=0,cert=server.pem,key=server.key" "TCP:127.0.0.2:$inner"
	server_start socat "TCP-LISTEN:$outer,bind=127.0.0.1,fork,reuseaddr" \
	    "OPENSSL:127.0.0.1:$pebble,verify=0"
	up "$outer"
}

# with_fault KIND PROCESS CALL NAME: the step, with that fault.
with_fault() {
	case $1 in
	CUT|STALL|CORRUPT)
		set -- "$1" "$3" "localhost:$pebble" 127.0.0.2 "$pebble" \
		    "$pebble" ;;
	TRUNCATE)
		set -- CUT "$3" "localhost:$pebble" 127.0.0.3 "$inner" \
		    "$outer" ;;
	REWRITE)
		set -- CORRUPT "$3" "localhost:$pebble" 127.0.0.3 "$inner" \
		    "$outer" ;;
	*)
		faulty_step "$tools/fault" ../log "$2" "$3" "$4" "$1" \
		    >../out 2>../err
		return ;;
	esac
	[ "$1" != STALL ] || ACME_TIMEOUT=3
	faulty_step "$tools/relay" ../log "$@" >../out 2>../err
	set -- $?
	ACME_TIMEOUT=20
	return "$1"
}

# fault_count: the calls of $step, as lines "STEP PROCESS CALL NAME FAULT...",
# and the bytes that it gets from the CA.
fault_count() {
	fault_try - && sed "s/^/$step /" log >>calls.new &&
	fault_try CUT && fault_bytes 1 'CUT CORRUPT' &&
	fault_bytes 8 STALL &&
	fault_try TRUNCATE && fault_bytes 1 'TRUNCATE REWRITE'
}

# fault_try KIND: the step without a fault.
fault_try() {
	fault_begin || return
	with_fault "$1" 0 0 -
	set -- $?
	cd .. && [ "$1" = "$usual" ] && return
	echo "$step: status $1"
	cat out err
	return 1
}

# fault_bytes N KINDS
fault_bytes() {
	seq 1 "$(($1 * ${FAULTS_BYTES:-32}))" "$(cat log)" |
	sed "s/.*/$step 0 & byte $2/" >>calls.new
}

# fault_begin: a directory with what $step reads.  $made is the file that it
# makes, $usual its exit status, $says the number of its messages.
fault_begin() {
	serial=$((serial + 1))
	name=job-$serial.test made=order usual=0 says=0
	rm -rf job && cp -R kept job && cd job || return
	case $step in
	key)		made=new.pem ;;
	new-account)	made=account && fresh_key ;;
	new-order*)	;;
	challenges)	made=todo && new_order >order ;;
	respond-*)	made=ready && new_order >order ;;
	finalize)	made=chain.pem && new_order | respond >ready ;;
	replace)	made=chain.pem && new_order | respond >ready &&
			cp ../old.pem chain.pem && chmod 640 chain.pem ;;
	key-change)	made=changed says=1 && fresh_key &&
			acme-step new-account -y -o account ;;
	box)		made='' usual=75 says=1 ;;
	send)		made='' && boxed 2>../err; [ $? = 75 ] ;;
	unbox)		send_all ;;
	renewal-info)	made='' usual=1 && cp ../old.pem chain.pem ;;
	revoke-cert)	made='' && whole_way ;;
	pipe-*)		made=chain.pem ;;
	esac || return
	set -- *
	before=$*
	for file; do
		shift
		[ -d "$file" ] || [ "$file" = "$made" ] || set -- "$@" "$file"
	done
	sha256sum "$@" >../sums
}

fresh_key() {
	rm account account.pem && acme-step key -o account.pem &&
	acme-step key -o new.pem
}
new_order() { acme-step new-order -a account "$name"; }
respond() { acme-step respond -w "$www"; }
finalize() { acme-step finalize -K leaf.pem -o chain.pem; }
whole_way() { new_order | respond | finalize; }
boxed() { acme-step new-order -B box -a account -o order "$name"; }
# send_all: until the next run of the step has all responses.
send_all() {
	until boxed 2>../err.box; do
		[ $? = 75 ] && acme-step send box || return
	done
	rm order
}

# faulty_step COMMAND...: the step, under that command.
faulty_step() {
	case $step in
	key)		"$@" acme-step key -o new.pem ;;
	new-account)	"$@" acme-step new-account -y -o account ;;
	new-order)	"$@" acme-step new-order -a account -o order "$name" ;;
	new-order-out)	"$@" acme-step new-order -a account "$name" >order ;;
	challenges)	"$@" acme-step challenges -o todo <order ;;
	respond-w)	"$@" acme-step respond -w "$www" -o ready <order ;;
	respond-l)	"$@" acme-step respond -t tls-alpn-01 \
			    -l "127.0.0.1:$tls" -o ready <order ;;
	respond-x)	"$@" acme-step respond -t http-01 -x ../hook \
			    -o ready <order ;;
	respond-certbot)	"$@" acme-step respond -t http-01 \
			    -x certbot:../publish,../remove -o ready <order ;;
	finalize|replace)	"$@" acme-step finalize -K leaf.pem \
			    -o chain.pem <ready ;;
	key-change)	"$@" acme-step key-change -a account -K new.pem \
			    -o changed ;;
	box|unbox)	"$@" acme-step new-order -B box -a account -o order \
			    "$name" ;;
	send)		"$@" acme-step send box ;;
	renewal-info)	"$@" acme-step renewal-info -a account chain.pem ;;
	revoke-cert)	"$@" acme-step revoke-cert -a account chain.pem ;;
	pipe-1)		"$@" acme-step new-order -a account "$name" |
			respond | finalize ;;
	pipe-2)		new_order | tee -p order |
			"$@" acme-step respond -w "$www" | finalize ;;
	pipe-3)		new_order | respond | tee -p ready |
			"$@" acme-step finalize -K leaf.pem -o chain.pem ;;
	esac </dev/null
}

fault_hooks() {
	cat >hook <<-'EOF'
	#!/bin/sh
	echo from a hook
	case $1 in
	deploy_challenge)	printf %s "$4" >"$www/$3" ;;
	clean_challenge)	rm -f "$www/$3" ;;
	esac
	EOF
	cat >publish <<-'EOF'
	#!/bin/sh
	echo from a hook
	printf %s "$CERTBOT_VALIDATION" >"$www/$CERTBOT_TOKEN"
	EOF
	cat >remove <<-'EOF'
	#!/bin/sh
	echo from a hook
	rm -f "$www/$CERTBOT_TOKEN"
	EOF
	chmod +x hook publish remove
}

# fault_run: the step with a fault, all checks, and a line of results:
# STEP PROCESS CALL NAME FAULT OUTCOME REACHED exited|killed STATUS.
fault_run() {
	faults_found=
	fault_begin || return
	with_fault "$kind" "$process" "$call" "$what"
	ended=$?
	read -r reached argument how status caught late left <../log
	: >../after
	judge_status
	judge_words
	judge_files
	go_on >../after 2>&1 || wrong "not done when run again: $?"
	judge_certificate
	cd .. || return
	if [ "$faults_found" ]; then
		outcome=wrong
		{
			echo "$step $process $call $what $kind:$faults_found"
			cat log err after
			echo
		} >>wrong
	fi
	echo "$step $process $call $what $kind $outcome $reached $how $status" \
	    >>results
}

wrong() { faults_found="$faults_found $*;"; }

# judge_status: is the exit status one for this fault?
judge_status() {
	outcome=failed
	[ "$how $status" != "exited $usual" ] || outcome='done'
	[ "$late" = 0 ] || wrong 'it did not end'
	[ "$left" = 0 ] || wrong "$left processes are left"
	case $reached,$outcome in
	-,done)	outcome=missed ;;
	-,*)	wrong 'it failed without the fault' ;;
	esac
	[ "$outcome" = failed ] || return 0
	# A signal that arrives while its handler is being set may find it or
	# not.  A fault in the responder can make a validation fail.
	case $process,$kind,$how,$status in
	1,SIGKILL,killed,9)	;;
	1,SIGTERM,killed,15)	[ "$caught" = 0 ] ;;
	1,SIGTERM,exited,143)	[ "$caught" = 1 ] ||
				    [ "$reached" = rt_sigaction ] ;;
	1,SIG*)			false ;;
	0,REWRITE,exited,69|0,REWRITE,exited,7[05678]) ;;
	0,CORRUPT,exited,78)	;;
	0,*,exited,69|0,*,exited,75)	;;
	0,*)			false ;;
	[3-9],*,exited,77)	[ "$step" = respond-l ] ;;
	*,SIG*,exited,69|*,SIG*,exited,7[035]) ;;
	*,exited,*)		fits ;;
	*)			false ;;
	esac || wrong "$how $status"
	case $step,$how,$ended in
	pipe-*,exited,"$status"|pipe-[12],killed,65) ;;
	pipe-[12],exited,65)	[ "$reached $argument" = 'write 1' ] ;;
	pipe-[12],*,0)	is_whole ;;	# it had written its record
	pipe-3,exited,*)	false ;;
	pipe-[12],*)	false ;;
	esac || wrong "the pipeline exits $ended"
}

# fits: can the call that failed cause this exit status?  A file that cannot
# be opened can be an input, the output, or one that the look-up of the name
# needs; what is read and written, a file or the network.
fits() {
	case $kind,$reached in
	ENOSPC,*)				set -- 73 74 ;;
	*,open*|*,*stat|*,*statat|*,readlink)	set -- 66 69 73 ;;
	*,read*|*,recv*|*,write*|*,send*)	set -- 69 74 ;;
	*,close|*,fsync|*,ftruncate|*,lseek)	set -- 74 ;;
	*,rename*|*,unlink*|*,dup)		set -- 74 ;;
	*,link*|*,mkdir*|*,*chmod|*,access)	set -- 73 74 ;;
	*,execve|*,wait*|*,bind|*,accept*)	set -- 73 ;;
	*,socket|*,connect|*,?etsockopt)	set -- 69 73 ;;
	*,fork|*,clone|*,pipe*|*,socketpair)	set -- 70 73 ;;
	*,dup[23]|*,set*id|*,setgroups|*,chdir)	set -- 69 70 73 ;;
	*,getrandom|*,poll)			set -- 69 70 ;;
	*,mmap|*,brk|*,mprotect)		set -- 69 70 ;;
	*)					set -- ;;
	esac
	case " $* " in *" $status "*) ;; *) false ;; esac
}

# judge_words: one message on failure, none on success, except that a fault
# which does not make the step fail may cause a warning.
judge_words() {
	messages=0
	while IFS= read -r line; do
		case $line in from*hook) continue ;; esac
		messages=$((messages + 1))
		case $line in
		'acme-step: '[a-z]*': '?*|'acme-step: ended by signal 15') ;;
		*)	wrong 'a strange message' ;;
		esac
	done <../err
	case $outcome,$how in
	failed,killed)	least=0 most=$says ;;
	failed,*)	least=1 most=1 ;;
	*)		least=$says most=$says ;;
	esac
	case $step,$how,$reached,$argument in
	pipe-[12],killed,*)	most=1 ;;	# of the next step
	pipe-[12],*,write,1)	most=2 ;;	# it is not told
	key-change,exited,*)	[ "$kind" != SIGTERM ] || most=2 ;;
	esac
	case $process,$kind,$reached,$outcome in
	?,E*,fsync,'done')	least=1 ;;	# of the directory: a warning
	esac
	case $process,$kind,$reached,$argument in
	1,SIG*)		# it can come as the message is to be written
			[ "$usual" = 0 ] || least=0 ;;
	[2-9],*)	most=2 ;;	# of that process, too
	*,write,2|*,writev,2)	least=0 most=2 ;;
	*)		[ "$outcome" = failed ] || most=2 ;;
	esac
	if [ "$messages" -lt "$least" ] || [ "$messages" -gt "$most" ]; then
		wrong "$messages message(s)"
	fi
}

# judge_files: the files that the step reads are unchanged, the one that it
# writes is complete or absent, and there are no others, except a temporary
# file after SIGKILL, or one that a message says cannot be removed.
judge_files() {
	sha256sum -c --quiet ../sums >../after 2>&1 || wrong 'a file changed'
	for file in * .[!.]* box/.[!.]*; do
		case " $before $made order ready box " in
		*" $file "*)	continue ;;
		esac
		case $file,$kind in
		.acme-step.*,SIGKILL|box/.acme-step.*,SIGKILL) ;;
		*)	[ ! -e "$file" ] ||
			    grep -q -e "cannot remove $file:" \
				-e "name $file cannot be removed" ../err ||
			    wrong "$file is there" ;;
		esac
	done
	case $kind in
	SIGKILL)	;;
	*)	[ -z "$(ls -A "$www")" ] ||
		    grep -q -e 'cannot remove' -e 'failed to clean up' ../err ||
		    wrong 'something is published' ;;
	esac
	case $kind,$step,$outcome in
	*,renewal-info,*)	[ ! -s ../out ] || grep -q ^moment ../out ;;
	*,new-order-out,*)	[ ! -s order ] || is_whole ;;
	*,replace,failed)	cmp -s chain.pem ../old.pem || is_whole ;;
	*,failed)		[ ! -e "$made" ] || is_whole ;;
	REWRITE,*)		;;	# signatures of a chain are not checked
	*)			[ ! "$made" ] || is_whole ;;
	esac || wrong "a part of $made"
	case $step in
	renewal-info)	;;
	*)	[ ! -s ../out ] || wrong 'standard output' ;;
	esac
	case $step in
	key)		set -- new.pem 600 ;;
	replace)	set -- chain.pem 640 ;;
	*)		return ;;
	esac
	# If the owner cannot be set, the mode is that of a new file.
	[ ! -e "$1" ] || [ "$(stat -c %a "$1")" = "$2" ] ||
	    [ "$reached" = fchown ] ||
	    wrong "the mode of $1"
}

# is_whole: $made is a whole key, chain or record.
is_whole() {
	case $made in
	new.pem)	openssl pkey -in new.pem -noout ;;
	chain.pem)	openssl verify -CAfile ../root.pem \
			    -untrusted chain.pem chain.pem ;;
	*)		[ "$(tail -n 1 $made)" = end ] ;;
	esac >../after 2>&1
}

# go_on: run the step again if it failed, was told something wrong or left
# something published; then run the steps that follow.
go_on() {
	case $outcome,$kind in
	failed,*|*,REWRITE)	again ;;
	*)			[ -z "$(ls -A "$www")" ] || again ;;
	esac || return
	case $step in
	key)			mv new.pem leaf.pem && whole_way ;;
	new-account)		whole_way ;;
	key-change)		mv new.pem account.pem && mv changed account &&
				whole_way ;;
	new-order*|unbox)	respond <order | finalize ;;
	box|send)		send_all && boxed &&
				respond <order | finalize ;;
	challenges)		respond <todo | finalize ;;
	respond-*)		finalize <ready ;;
	revoke-cert)		(cd .. && status_of job/chain.pem) |
				grep '"Revoked"' ;;
	esac
}

# again: an order becomes invalid if what was published is removed before the
# CA looks for it: then a new one is placed.
again() {
	case $step in
	key)	[ -e new.pem ] || faulty_step; return ;;
	box)	return 0 ;;
	pipe-2)	[ -s order ] || { whole_way; return; }
		respond <order >ready ;;
	pipe-3)	finalize <ready; return ;;
	send)	# what a box has been told stays there
		[ "$kind" != REWRITE ] || { rm -r box; return; }
		faulty_step ;;
	*)	faulty_step ;;
	esac
	set -- $?
	case $step,$1 in
	respond-*,77)	new_order >order && faulty_step ;;
	pipe-2,77)	whole_way ;;
	pipe-2,0)	finalize <ready ;;
	*)		[ "$1" = "$usual" ] ;;
	esac
}

judge_certificate() {
	set -- "$public"
	case $step in
	key)	set -- "$(openssl pkey -in leaf.pem -pubout)" ;;
	renewal-info)	name=old.test ;;
	esac
	openssl verify -CAfile ../root.pem -untrusted chain.pem chain.pem \
	    >>../after 2>&1 || wrong 'no certificate'
	case $(openssl x509 -in chain.pem -noout -pubkey -ext subjectAltName) in
	*"DNS:$name
"*"$1"|*"$1"*"DNS:$name") ;;
	*)	wrong 'another certificate' ;;
	esac
	for file in "$www"/* "$www"/.[!.]*; do
		case $file,$kind in
		*/.acme-step.*,SIGKILL) ;;
		*/.acme-step.*)	[ ! -e "$file" ] ||
				    grep -q "remove ${file##*/}" ../err ||
				    wrong "$file is there" ;;
		*)	[ ! -e "$file" ] || wrong "$file is published" ;;
		esac
		rm -f "$file"
	done
}

# fault, the tool that lets a call fail.
fault_tool() {
	cat >fault.c <<'EOF'
/*
 * fault LOG PROCESS CALL NAME FAULT COMMAND...: run a step, and let the
 * CALLth system call of its PROCESSth process, or the first after it that has
 * that NAME, meet FAULT: SIGKILL or SIGTERM as it begins, or the name of an
 * error in place of what it would do.  Its processes are numbered as they are
 * made; one that becomes another program, such as a hook, and those that it
 * makes meet nothing.
 *
 * The line that LOG gets: the name of the call, or "-" if it was not
 * reached; its first argument; "exited" or "killed" and the status or the
 * signal; 1 if SIGTERM had a handler; 1 if the time limit was reached; the
 * number of processes that the step left behind.
 *
 * With PROCESS 0 nothing fails, and LOG gets a line for each call: PROCESS,
 * CALL, its name, and the faults that it can meet.
 *
 * A filter (seccomp) stops the step at each call except those that ask for
 * the flags of a descriptor: the responder makes 65,536 of these, and they
 * cannot fail in another way than that the descriptor is not open.
 */
#define _GNU_SOURCE
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
	LIMIT  = 60,		/* seconds for the step */
	AFTER  = 10,		/* seconds until its other processes end */
	PROCESSES = 256
};

/*
 * The errors that the manual pages allow, in Linux, for calls that the step
 * makes.  Those that cannot fail on valid arguments meet signals only:
 * process identities, signal masks and handlers, timers, exits; also
 * close-on-exec and other flags of descriptors.  close() gives the
 * descriptor back before it reports its error.
 */
#define CALL(name, errors)  { SYS_##name, #name, errors }
static const struct call {
	long number;
	const char *name, *errors;
} calls[] = {
	CALL(read, "EIO EINTR EAGAIN"),
	CALL(readv, "EIO EINTR EAGAIN"),
	CALL(write, "EIO EINTR EAGAIN"),
	CALL(writev, "EIO EINTR EAGAIN"),
	CALL(open, "EIO EINTR ENOMEM EMFILE"),
	CALL(openat, "EIO EINTR ENOMEM EMFILE"),
	CALL(close, "EIO EINTR"),
	CALL(stat, "EIO ENOMEM"),
	CALL(lstat, "EIO ENOMEM"),
	CALL(fstat, "EIO ENOMEM"),
	CALL(newfstatat, "EIO ENOMEM"),
	CALL(statfs, "EIO EINTR ENOMEM"),
	CALL(fstatfs, "EIO EINTR ENOMEM"),
	CALL(access, "EIO ENOMEM"),
	CALL(chdir, "EIO ENOMEM"),
	CALL(readlink, "EIO ENOMEM"),
	CALL(getdents64, "EIO ENOMEM"),
	CALL(lseek, "EIO"),
	CALL(fsync, "ENOSPC EIO EINTR"),
	CALL(ftruncate, "ENOSPC EIO EINTR"),
	CALL(link, "ENOSPC EIO ENOMEM"),
	CALL(linkat, "ENOSPC EIO ENOMEM"),
	CALL(rename, "ENOSPC EIO ENOMEM"),
	CALL(renameat, "ENOSPC EIO ENOMEM"),
	CALL(unlink, "EIO ENOMEM"),
	CALL(unlinkat, "EIO ENOMEM"),
	CALL(mkdir, "ENOSPC EIO ENOMEM"),
	CALL(mkdirat, "ENOSPC EIO ENOMEM"),
	CALL(chmod, "ENOSPC EIO ENOMEM"),
	CALL(fchmod, "ENOSPC EIO ENOMEM"),
	CALL(fchown, "ENOSPC EIO ENOMEM"),
	CALL(mmap, "ENOMEM EAGAIN"),
	CALL(brk, "ENOMEM"),
	CALL(mprotect, "ENOMEM"),
	CALL(munmap, ""),
	CALL(clone, "ENOMEM EAGAIN"),
	CALL(fork, "ENOMEM EAGAIN"),
	CALL(vfork, "ENOMEM EAGAIN"),
	CALL(execve, "EIO ENOMEM EMFILE EAGAIN"),
	CALL(wait4, "EINTR"),
	CALL(waitid, "EINTR"),
	CALL(kill, ""),
	CALL(pipe, "EMFILE ENOMEM"),
	CALL(pipe2, "EMFILE ENOMEM"),
	CALL(dup, "EMFILE ENOMEM"),
	CALL(dup2, "EINTR EMFILE"),
	CALL(dup3, "EINTR EMFILE"),
	CALL(fcntl, ""),
	CALL(ioctl, ""),
	CALL(socket, "EMFILE ENOMEM"),
	CALL(socketpair, "EMFILE ENOMEM"),
	CALL(bind, "ENOMEM"),
	CALL(listen, ""),
	CALL(connect, "EINTR ENOMEM EAGAIN"),
	CALL(accept, "EINTR ENOMEM EMFILE EAGAIN"),
	CALL(accept4, "EINTR ENOMEM EMFILE EAGAIN"),
	CALL(sendto, "EIO EINTR ENOMEM EAGAIN"),
	CALL(recvfrom, "EIO EINTR ENOMEM EAGAIN"),
	CALL(sendmsg, "EIO EINTR ENOMEM EAGAIN"),
	CALL(recvmsg, "EIO EINTR ENOMEM EAGAIN"),
	CALL(shutdown, ""),
	CALL(setsockopt, "ENOMEM"),
	CALL(getsockopt, "ENOMEM"),
	CALL(getsockname, ""),
	CALL(getpeername, ""),
	CALL(poll, "EINTR ENOMEM EAGAIN"),
	CALL(nanosleep, "EINTR"),
	CALL(clock_nanosleep, "EINTR"),
	CALL(getrandom, "EINTR EAGAIN EIO"),
	CALL(prctl, ""),
	CALL(setsid, ""),
	CALL(setpgid, ""),
	CALL(setgroups, "ENOMEM"),
	CALL(setgid, "EAGAIN"),
	CALL(setuid, "EAGAIN"),
	CALL(setresgid, "EAGAIN"),
	CALL(setresuid, "EAGAIN"),
	CALL(arch_prctl, ""),
	CALL(set_tid_address, ""),
	CALL(prlimit64, ""),
	CALL(rt_sigaction, ""),
	CALL(rt_sigprocmask, ""),
	CALL(rt_sigreturn, ""),
	CALL(restart_syscall, ""),
	CALL(setitimer, ""),
	CALL(getpid, ""),
	CALL(gettid, ""),
	CALL(getppid, ""),
	CALL(getuid, ""),
	CALL(geteuid, ""),
	CALL(getgid, ""),
	CALL(getegid, ""),
	CALL(exit, ""),
	CALL(exit_group, "")
};

#define ERROR(name)  { name, #name }
static const struct {
	int number;
	const char *name;
} errors[] = {
	ERROR(ENOSPC), ERROR(EIO), ERROR(EINTR), ERROR(ENOMEM), ERROR(EMFILE),
	ERROR(EAGAIN)
};

static struct process {
	pid_t pid;		/* 0: gone */
	unsigned long count;	/* of its calls */
	bool caught;		/* SIGTERM has a handler */
	bool other;		/* another program */
} process[PROCESSES];
static size_t nprocess;
static FILE *out;
static size_t target;		/* PROCESS */
static unsigned long nth;	/* CALL */
static const char *wanted;	/* NAME */
static int error;		/* 0: `sig` */
static int sig;
static const char *reached = "-";
static unsigned long long argument;
static bool was_caught;
static volatile sig_atomic_t late;

static void
give_up(const char *what)
{
	perror(what);
	exit(125);
}

static struct process *
find(pid_t pid)
{
	for (size_t i = 0; i < nprocess; i++)
		if (process[i].pid == pid)
			return &process[i];
	if (nprocess == PROCESSES)
		give_up("too many processes");
	process[nprocess].pid = pid;
	return &process[nprocess++];
}

static const struct call *
call(unsigned long long number)
{
	static struct call unknown = { 0, "?", "" };
	static char name[30];

	for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
		if ((unsigned long long)calls[i].number == number)
			return &calls[i];
	snprintf(name, sizeof name, "unknown-%llu", number);
	unknown.name = name;
	return &unknown;
}

/* Can the call run out of room? It creates a file or writes to one. */
static bool
needs_room(pid_t pid, const struct __ptrace_syscall_info *i)
{
	const uint64_t *a = i->seccomp.args;
	char link[64], to[64];
	ssize_t n;

	switch (i->seccomp.nr) {
	case SYS_open:
		return a[1] & O_CREAT;
	case SYS_openat:
		return a[2] & O_CREAT;
	case SYS_write:
	case SYS_writev:
		snprintf(link, sizeof link, "/proc/%d/fd/%d", (int)pid,
		    (int)a[0]);
		n = readlink(link, to, sizeof to);
		return n > 0 && to[0] == '/';
	}
	return false;
}

/* In place of the call, or as its result: the error. */
static void
fail(pid_t pid)
{
	struct user_regs_struct r;

	if (ptrace(PTRACE_GETREGS, pid, 0, &r) != 0)
		give_up("PTRACE_GETREGS");
	r.orig_rax = (unsigned long long)-1;
	r.rax = (unsigned long long)-error;
	if (ptrace(PTRACE_SETREGS, pid, 0, &r) != 0)
		give_up("PTRACE_SETREGS");
}

/* A call begins; how its process is to go on. */
static enum __ptrace_request
at_call(struct process *p)
{
	struct __ptrace_syscall_info i;
	bool hit;

	if (ptrace(PTRACE_GET_SYSCALL_INFO, p->pid, sizeof i, &i) <= 0 ||
	    i.op != PTRACE_SYSCALL_INFO_SECCOMP)
		return PTRACE_CONT;	/* it was killed meanwhile */
	p->count++;
	if (!target)
		fprintf(out, "%d %lu %s SIGKILL SIGTERM %s%s\n",
		    (int)(p - process) + 1, p->count,
		    call(i.seccomp.nr)->name, call(i.seccomp.nr)->errors,
		    needs_room(p->pid, &i) ? " ENOSPC" : "");
	hit = p == process + target - 1 && p->count >= nth && *reached == '-'
	    && strcmp(call(i.seccomp.nr)->name, wanted) == 0
	    && (error != ENOSPC || needs_room(p->pid, &i) ||
	    strstr(call(i.seccomp.nr)->errors, "ENOSPC"));
	if (hit) {
		reached = call(i.seccomp.nr)->name;
		argument = i.seccomp.args[0];
		was_caught = p->caught;
	}
	p->caught = p->caught || (i.seccomp.nr == SYS_rt_sigaction &&
	    i.seccomp.args[0] == SIGTERM && i.seccomp.args[1]);
	if (hit && !error)
		kill(p->pid, sig);
	if (!hit || !error)
		return PTRACE_CONT;
	if (i.seccomp.nr == SYS_close)
		return PTRACE_SYSCALL;	/* to its end */
	fail(p->pid);
	return PTRACE_CONT;
}

static void
stopped(struct process *p, int status)
{
	enum __ptrace_request how = PTRACE_CONT;
	unsigned long child;
	int deliver = 0;

	switch (status >> 16) {
	case PTRACE_EVENT_SECCOMP:
		if (!p->other)
			how = at_call(p);
		break;
	case PTRACE_EVENT_FORK:
	case PTRACE_EVENT_VFORK:
	case PTRACE_EVENT_CLONE:
		if (ptrace(PTRACE_GETEVENTMSG, p->pid, 0, &child) == 0)
			find((pid_t)child)->other = p->other;
		break;
	case PTRACE_EVENT_EXEC:
		p->other = true;
		break;
	default:
		if (WSTOPSIG(status) == (SIGTRAP | 0x80))
			fail(p->pid);
		else if (WSTOPSIG(status) != SIGSTOP)
			deliver = WSTOPSIG(status);
	}
	ptrace(how, p->pid, 0, deliver);
}

static void
on_alarm(int s)
{
	(void)s;
	late = true;
}

/* End all processes; how many of the step's there were. */
static int
end_all(void)
{
	int n = 0;

	for (size_t i = 0; i < nprocess; i++)
		if (process[i].pid && kill(process[i].pid, SIGKILL) == 0)
			n += !process[i].other;
	return n;
}

/* Stop at each call except fcntl(fd, F_GETFD). */
static void
set_filter(void)
{
#define FIELD(f)  BPF_STMT(BPF_LD | BPF_W | BPF_ABS, \
    offsetof(struct seccomp_data, f))
#define IS(k, otherwise)  BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, k, 0, otherwise)
	struct sock_filter f[] = {
		FIELD(nr), IS(SYS_fcntl, 3), FIELD(args[1]), IS(F_GETFD, 1),
		BPF_STMT(BPF_RET, SECCOMP_RET_ALLOW),
		BPF_STMT(BPF_RET, SECCOMP_RET_TRACE)
	};
	struct sock_fprog program = { sizeof f / sizeof *f, f };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
		give_up("seccomp");
}

static void
start(char **command)
{
	enum { OPTIONS = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEFORK |
	    PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC |
	    PTRACE_O_TRACESECCOMP | PTRACE_O_EXITKILL };
	pid_t pid = fork();
	int status;

	if (pid == 0) {
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		raise(SIGSTOP);
		set_filter();
		execvp(*command, command);
		give_up(*command);
	}
	find(pid);
	if (waitpid(pid, &status, 0) != pid ||
	    ptrace(PTRACE_SETOPTIONS, pid, 0, OPTIONS) != 0)
		give_up("ptrace");
	do
		if (ptrace(PTRACE_CONT, pid, 0, 0) != 0 ||
		    waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status))
			give_up("ptrace");
	while (status >> 16 != PTRACE_EVENT_EXEC);
	ptrace(PTRACE_CONT, pid, 0, 0);
}

int
main(int argc, char **argv)
{
	struct sigaction act = { .sa_handler = on_alarm };
	int status, first = 0, left = 0;
	bool ended = false, over = false;
	pid_t pid;

	if (argc < 7 || !(out = fopen(argv[1], "we")))
		give_up("usage");
	target = strtoul(argv[2], NULL, 10);
	nth = strtoul(argv[3], NULL, 10);
	wanted = argv[4];
	for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
		if (strcmp(argv[5], errors[i].name) == 0)
			error = errors[i].number;
	sig = strcmp(argv[5], "SIGKILL") == 0 ? SIGKILL : SIGTERM;
	start(argv + 6);
	sigaction(SIGALRM, &act, NULL);
	alarm(LIMIT);
	for (;;) {
		pid = waitpid(-1, &status, __WALL);
		if (pid < 0 && errno == ECHILD)
			break;
		if (late) {
			over = over || !ended;
			left += end_all();
			late = false;
		}
		if (pid > 0 && WIFSTOPPED(status)) {
			stopped(find(pid), status);
		} else if (pid > 0) {
			find(pid)->pid = 0;
			if (ended || process[0].pid)
				continue;
			ended = true;
			first = status;
			alarm(AFTER);
		}
	}
	if (target)
		fprintf(out, "%s %llu %s %d %d %d %d\n", reached, argument,
		    WIFSIGNALED(first) ? "killed" : "exited",
		    WIFSIGNALED(first) ? WTERMSIG(first) : WEXITSTATUS(first),
		    was_caught, over, left);
	if (fclose(out) != 0)
		give_up(argv[1]);
	return WIFSIGNALED(first) ? 128 + WTERMSIG(first) :
	    WEXITSTATUS(first);
}
EOF
	cc -std=c99 -Wall -Wextra -Werror -O1 -o fault fault.c ||
	    give_up 'cannot compile fault.c'
}

# relay, the tool between a step and the CA.
relay_tool() {
	cat >relay.c <<'EOF'
/*
 * relay LOG FAULT BYTE HOST:PORT ADDRESS LISTEN TARGET COMMAND...: run a
 * step, which finds HOST:PORT at ADDRESS, and pass on what comes to the port
 * LISTEN of 127.0.0.2 to the port TARGET of 127.0.0.1, and the answers to
 * it.  FAULT meets the BYTEth byte of all answers: CUT closes the connection
 * in its place, STALL passes on nothing more of it, CORRUPT changes a bit.
 *
 * LOG gets a line like that of fault.  With BYTE 0 it is the number of bytes.
 */
#define _GNU_SOURCE
#include <sys/socket.h>
#include <sys/wait.h>
#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
	LIMIT = 60,		/* seconds for the step */
	PAIRS = 32		/* connections */
};

static int fds[2 * PAIRS + 1];	/* pairs: the step, the CA; the listener */
static unsigned long seen, nth;
static char fault;
static bool reached;
static volatile sig_atomic_t late;

static void
give_up(const char *what)
{
	perror(what);
	exit(125);
}

static void
on_signal(int sig)
{
	late = late || sig == SIGALRM;
}

static int
new_socket(struct sockaddr_in *to, const char *address, const char *port)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	memset(to, 0, sizeof *to);
	to->sin_family = AF_INET;
	to->sin_port = htons((unsigned short)atoi(port));
	to->sin_addr.s_addr = inet_addr(address);
	return fd;
}

static void
listen_on(const char *port)
{
	struct sockaddr_in at;
	int fd = new_socket(&at, "127.0.0.2", port), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(fd, (struct sockaddr *)&at, sizeof at) != 0 ||
	    listen(fd, PAIRS) != 0)
		give_up("listen");
	fds[2 * PAIRS] = fd;
}

static void
open_pair(const char *port)
{
	struct sockaddr_in to;
	int i = 0;

	while (i < PAIRS && fds[2 * i] >= 0)
		i++;
	if (i == PAIRS)
		give_up("too many connections");
	fds[2 * i] = accept4(fds[2 * PAIRS], NULL, NULL, SOCK_CLOEXEC);
	fds[2 * i + 1] = new_socket(&to, "127.0.0.1", port);
	if (connect(fds[2 * i + 1], (struct sockaddr *)&to, sizeof to) != 0)
		give_up("connect");
}

static void
close_pair(int i)
{
	close(fds[i]);
	close(fds[i ^ 1]);
	fds[i] = fds[i ^ 1] = -1;
}

/* Pass on what has come to a socket, up to the fault. */
static void
pass(int i)
{
	char b[16384];
	ssize_t n = read(fds[i], b, sizeof b), good = n;
	bool hit = n > 0 && i % 2 && seen < nth &&
	    nth <= seen + (unsigned long)n;

	if (hit)
		good = (ssize_t)(nth - 1 - seen);
	if (n > 0 && i % 2)
		seen += (unsigned long)n;
	reached = reached || hit;
	if (hit && fault == 'O') {
		b[good] ^= 1;
		good = n;
		hit = false;
	}
	if (n <= 0 || send(fds[i ^ 1], b, (size_t)good, MSG_NOSIGNAL) != good
	    || (hit && fault == 'U'))
		close_pair(i);
	else if (hit)		/* the descriptors stay open, forgotten */
		fds[i] = fds[i ^ 1] = -1;
}

int
main(int argc, char **argv)
{
	struct sigaction act = { .sa_handler = on_signal };
	struct pollfd p[2 * PAIRS + 1];
	sigset_t chld, none;
	char resolve[100];
	int status;
	FILE *out;
	pid_t pid;

	if (argc < 9 || !(out = fopen(argv[1], "we")))
		give_up("usage");
	fault = argv[2][1];
	nth = strtoul(argv[3], NULL, 10);
	memset(fds, -1, sizeof fds);
	listen_on(argv[6]);
	snprintf(resolve, sizeof resolve, "%s:%s", argv[4], argv[5]);
	setenv("ACME_RESOLVE", resolve, 1);
	sigemptyset(&none);
	sigemptyset(&chld);
	sigaddset(&chld, SIGCHLD);
	sigprocmask(SIG_BLOCK, &chld, NULL);
	sigaction(SIGCHLD, &act, NULL);
	sigaction(SIGALRM, &act, NULL);
	alarm(LIMIT);
	if ((pid = fork()) == 0) {
		sigprocmask(SIG_SETMASK, &none, NULL);
		execvp(argv[8], argv + 8);
		give_up(argv[8]);
	}
	while (waitpid(pid, &status, WNOHANG) == 0) {
		for (int i = 0; i <= 2 * PAIRS; i++)
			p[i] = (struct pollfd){ fds[i], POLLIN, 0 };
		if (ppoll(p, 2 * PAIRS + 1, NULL, &none) < 0) {
			if (late)
				kill(pid, SIGKILL);
			continue;
		}
		for (int i = 0; i < 2 * PAIRS; i++)
			if (p[i].revents && fds[i] == p[i].fd)
				pass(i);
		if (p[2 * PAIRS].revents)
			open_pair(argv[7]);
	}
	if (nth)
		fprintf(out, "%s %lu %s %d 1 %d 0\n", reached ? "byte" : "-",
		    nth, WIFSIGNALED(status) ? "killed" : "exited",
		    WIFSIGNALED(status) ? WTERMSIG(status) :
		    WEXITSTATUS(status), late);
	else
		fprintf(out, "%lu\n", seen);
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) :
	    WEXITSTATUS(status);
}
EOF
	cc -std=c99 -Wall -Wextra -Werror -O1 -o relay relay.c ||
	    give_up 'cannot compile relay.c'
}

# ----------------------------------------------------------------- load --

# The responders under load, and many steps at once.  This needs two processors
# for itself: what it measures is in the titles.
load() {
	world_start
	load_tools
	for type in http-01 tls-alpn-01 dns-01; do
		group "load: respond -l, $type"
		load_responder
	done
	pebble_start
	group 'at once: 64 pipelines, one account'
	load_pipelines
	group 'at once: 64 steps, one file or port'
	load_collisions
	finish
}

# flood FILE ANSWER PORT RATE SECONDS HELD: open RATE connections a second
# that ask: each sends the bytes of FILE, and is answered if what comes back
# begins with ANSWER.  At most 1000 of them are open at a time.  HELD others
# stay: every second one sends a byte of FILE each second, without the last,
# the others send nothing.  If the server closes them they come again, up to
# HELD in a second.  It prints how many asked, how many were answered, how
# many were ended without an answer, how many could not connect, how many of
# those that stay were connected on average, and how often one came.  They
# come from addresses in 127.1.0.0/16, so that ports suffice, and end with a
# reset, which leaves nothing to the system.  Other people's generators for
# HTTP ask as fast as they can, and keep none that is slow.
load_tools() {
	cat >flood.c <<-'END'
	#define _GNU_SOURCE
	#include <arpa/inet.h>
	#include <errno.h>
	#include <netinet/in.h>
	#include <stdio.h>
	#include <stdlib.h>
	#include <string.h>
	#include <sys/epoll.h>
	#include <sys/socket.h>
	#include <time.h>
	#include <unistd.h>
	enum { ASKING = 1000, MOST = 4096, BATCH = 32 };
	static struct peer {
		int fd;
		int kind;		/* 0 asks, 1 is silent, 2 is slow */
		size_t sent;
		double next;		/* when a slow one sends again */
	} peers[MOST];
	static char say[4096];
	static size_t length;
	static const char *answer;
	static int port, epoll, asking, held;
	static long opened, answered, ended, failed, reopened;
	static double
	now(void)
	{
		struct timespec t;

		clock_gettime(CLOCK_MONOTONIC, &t);
		return t.tv_sec + t.tv_nsec / 1e9;
	}
	static void
	drop(struct peer *p)
	{
		struct linger reset = { 1, 0 };

		setsockopt(p->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
		close(p->fd);
		p->fd = -1;
		if (p->kind)
			held--;
		else
			asking--;
	}
	static struct sockaddr_in
	address(const char *ip, int to)
	{
		struct sockaddr_in a = { .sin_family = AF_INET,
		    .sin_port = htons(to) };

		inet_pton(AF_INET, ip, &a.sin_addr);
		return a;
	}
	static int
	dial(struct peer *p, int kind)
	{
		static unsigned last;
		struct epoll_event e = { EPOLLIN | EPOLLOUT | EPOLLET,
		    { .ptr = p } };
		char ip[32];
		struct sockaddr_in to = address("127.0.0.1", port), from;
		int on = 1;

		last++;
		snprintf(ip, sizeof ip, "127.1.%u.%u", last / 250 % 250,
		    last % 250 + 1);
		from = address(ip, 0);
		p->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
		p->kind = kind;
		p->sent = 0;
		p->next = 0;
		if (p->fd < 0)
			exit(3);
		if (kind)
			held++;
		else
			asking++;
		setsockopt(p->fd, IPPROTO_IP, 24 /* BIND_ADDRESS_NO_PORT */,
		    &on, sizeof on);
		bind(p->fd, (void *)&from, sizeof from);
		if (connect(p->fd, (void *)&to, sizeof to) != 0 &&
		    errno != EINPROGRESS) {
			failed++;
			drop(p);
			return 1;
		}
		if (kind)
			reopened++;
		else
			opened++;
		epoll_ctl(epoll, EPOLL_CTL_ADD, p->fd, &e);
		return 1;
	}
	static void
	serve(struct peer *p, unsigned events)
	{
		char b[8192];
		ssize_t n;

		if (p->fd < 0)
			return;
		if (!p->kind && !p->sent && events & EPOLLOUT &&
		    (n = send(p->fd, say, length, MSG_NOSIGNAL)) > 0)
			p->sent = n;
		if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
			return;
		n = recv(p->fd, b, sizeof b, 0);
		if (n < 0 && errno == EAGAIN)
			return;
		if (!p->kind && n > 0 && n >= (ssize_t)strlen(answer) &&
		    memcmp(b, answer, strlen(answer)) == 0)
			answered++;
		else if (!p->kind)
			ended++;
		drop(p);
	}
	static void
	slow(struct peer *p, double t)
	{
		if (p->fd < 0 || p->kind != 2 || t < p->next)
			return;
		p->next = t + 1;
		if (p->sent + 1 < length)
			send(p->fd, say + p->sent++, 1, MSG_NOSIGNAL);
	}
	int
	main(int argc, char **argv)
	{
		FILE *f = fopen(argv[1], "r");
		double rate = atof(argv[4]), start = now(), t, sum = 0;
		double end = start + atof(argv[5]);
		int hold = atoi(argv[6]);
		long ticks = 0;

		(void)argc;
		length = fread(say, 1, sizeof say, f);
		answer = argv[2];
		port = atoi(argv[3]);
		epoll = epoll_create1(0);
		for (int i = 0; i < MOST; i++)
			peers[i].fd = -1;
		while ((t = now()) < end) {
			struct epoll_event e[512];
			int i = 0, n, batch = 0;

			for (; i < MOST && batch < BATCH && held < hold &&
			    reopened < hold * (1 + t - start); i++)
				if (peers[i].fd < 0)
					batch += dial(&peers[i], 1 + i % 2);
			for (; i < MOST && batch < 2 * BATCH && asking <
			    ASKING && opened + failed < rate * (t - start); i++)
				if (peers[i].fd < 0)
					batch += dial(&peers[i], 0);
			n = epoll_wait(epoll, e, 512, 1);
			for (i = 0; i < n; i++)
				serve(e[i].data.ptr, e[i].events);
			for (i = ticks % 16; i < MOST; i += 16)
				slow(&peers[i], t);
			sum += held;
			ticks++;
		}
		printf("%ld %ld %ld %ld %.0f %ld\n", opened, answered, ended,
		    failed, sum / ticks, reopened);
		return 0;
	}
	END
	cc -w -O2 -o bin/flood flood.c || exit
}

# One responder, of the challenge type $type, for a step of 100 names, which
# Pebble validates at moments spread over 70 seconds.
load_responder() {
	old_web=$web old_tls=$tls old_dns=$dns
	port=$(free_port)
	case $type in
	http-01)	web=$port ;;
	tls-alpn-01)	tls=$port ;;
	dns-01)		dns=$port ;;
	esac
	pebble_start PEBBLE_VA_NOSLEEP=0 PEBBLE_VA_SLEEPTIME=70
	names=$(seq -f 'n%g.load.test' 100)
	rm -f account.pem account ready chain.pem
	# shellcheck disable=SC2086	# names, one word each
	{ acme-step key -o account.pem && acme-step new-account -y -o account &&
	  { [ -s leaf.pem ] || acme-step key -o leaf.pem; } &&
	  acme-step new-order -a account $names |
	  acme-step challenges -t "$type" >todo; } 2>err ||
	    give_up "$(cat err)"
	grep '^challenge ' todo >lines
	load_question
	acme-step respond -t "$type" -l "127.0.0.1:$port" -s 6 -T 240 \
	    <todo >ready 2>err & step=$!
	others=$pids pids="$pids $step"
	up "$port"
	await pgrep -P "$step" || give_up "$(cat err)"
	child=$(pgrep -P "$step")
	before=$(load_ticks) moment=$(date +%s)
	flood question x "$port" 0 4 250 >silent
	idle=$(($(load_ticks) - before))
	load_offer & offer=$!
	load_watch >seen
	wait "$step"
	got=$?
	pids=$others
	passed=$(($(date +%s) - moment))
	wait "$offer"
	web=$old_web tls=$old_tls dns=$old_dns
	load_checks
	pebble_stop
}

# What peers ask: the file question, for flood, and the file questions, for
# dnsperf.
load_question() {
	read -r _ _ _ _ _ name content <lines
	case $type in
	http-01)
		printf '%s\r\n' \
		    "GET /.well-known/acme-challenge/$name HTTP/1.1" \
		    'Host: n1.load.test' 'User-Agent: load' '' >question
		right='HTTP/1.1 200 OK' ;;
	tls-alpn-01)
		sink=$(free_port)
		socat -u "TCP-LISTEN:$sink,bind=127.0.0.1" - >question & got=$!
		await listening "$sink"
		load_hello "$name" "$sink" 1
		wait "$got"
		right=$(printf '\026\003\003') ;;
	dns-01)
		{ printf '\0%b' "\\0$(printf %o $((${#name} + 18)))"
		  printf '\022\064\001\0\0\001\0\0\0\0\0\0'
		  echo "$name" | tr . '\n' | while read -r label; do
			printf '%b%s' "\\0$(printf %o ${#label})" "$label"
		  done
		  printf '\0\0\020\0\001'; } >question
		while read -r _ _ _ _ _ name _; do
			printf '%s TXT\n%s A\n' "$name" "$name"
		done <lines >questions
		right='' ;;
	esac
}

# load_hello NAME PORT SECONDS: what a CA does for tls-alpn-01.
load_hello() {
	timeout "$3" openssl s_client -connect "127.0.0.1:$2" -tls1_2 \
	    -servername "$1" -alpn acme-tls/1 </dev/null 2>&1
}

# The minute: ten thousand questions a second, and a thousand peers more that
# only stay.
load_offer() {
	case $type in
	dns-01)
		flood question '' "$port" 500 60 1000 >flooded &
		dnsperf -s 127.0.0.1 -p "$port" -d questions -Q 10000 -l 60 \
		    -c 20 -q 1000 >dnsperf.log 2>&1
		wait $! ;;
	*)	# TLS needs all processors; a CA would have its own.
		nice -n 19 flood question "$right" "$port" 10000 60 1000 \
		    >flooded ;;
	esac
}

load_ticks() {
	echo $(($(cut -d ' ' -f 14,15 "/proc/$child/stat" | tr ' ' +)))
}

# Until the step ends, a line each second: the most KiB of the responder so
# far, the hundredths of a second that it has computed, whether it gave the
# right answer to a question of ours, and how many ms that took.
load_watch() {
	while kill -0 "$step" 2>/dev/null && [ -e "/proc/$child" ]; do
		line=$(shuf -n 1 lines)
		name=${line% *} name=${name##* } content=${line##* }
		from=$(date +%s%3N)
		load_look >looked 2>&1 && answer=right || answer=wrong
		[ -e "/proc/$child/status" ] || return
		echo "$(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' \
		    "/proc/$child/status") $(load_ticks) $answer" \
		    "$(($(date +%s%3N) - from))"
		sleep 1
	done 2>>servers.log
}
load_look() {
	case $type in
	http-01)
		curl -sS -m 9 "http://127.0.0.1:$port/.well-known/$(
		    )acme-challenge/$name" | grep -Fxe "$content" ;;
	tls-alpn-01)
		load_hello "$name" "$port" 9 | openssl x509 -outform DER |
		xxd -p | tr -d '\n' | grep -i "0420$content" ;;
	dns-01)
		dig +short +tries=3 +time=3 -p "$port" @127.0.0.1 TXT "$name" |
		grep -Fxe "\"$content\"" ;;
	esac
}

# load_sum COLUMN: of the file flooded.
load_sum() { cut -d ' ' -f "$1" flooded; }

load_checks() {
	case $type in
	dns-01)
		asked=$(sed -n 's/.*Queries sent: *//p' dnsperf.log)
		answered=$(sed -n 's/.*completed: *\([0-9]*\).*/\1/p' \
		    dnsperf.log)
		least=300000 ;;
	*)
		asked=$(load_sum 1) answered=$(load_sum 2)
		# No two processors can do ten thousand handshakes a second:
		# then a thousand wait, and others ask when these have ended.
		least=300000
		[ "$type" != tls-alpn-01 ] || least=6000 ;;
	esac
	: "${asked:=0}" "${answered:=0}"
	check "$type: the step ends well, after $passed s" '
	    cat err; [ "$got" = 0 ] && [ "$passed" -le 100 ] && [ ! -s err ]'
	check "$type: all 100 names are valid, and are issued" '
	    grep -x "status ready" ready &&
	    acme-step finalize -a account -K leaf.pem -o chain.pem <ready &&
	    issued leaf.pem chain.pem $(printf "DNS:%s " $names)'
	check "$type: in a minute $asked questions came, and $answered were \
answered (at least $least)" '
	    cat flooded; [ "$type" != dns-01 ] || cat dnsperf.log
	    [ "$answered" -ge "$least" ]'
	# At the end a thousand may be under way.  A peer whose bytes are late,
	# since others have the processors, can be ended by newer ones.
	check "$type: hardly a question had no answer: \
$((asked - answered)) of $asked" '
	    [ $((asked - answered)) -le $((1000 + asked / 20)) ]'
	check "$type: a thousand other peers were there at once, and came \
$(load_sum 6) times" '[ "$(load_sum 6)" -ge 2000 ]'
	check "$type: it is right under load, $(grep -c right seen) times, at \
most after $(cut -d " " -f 4 seen | sort -n | tail -n 1) ms" '
	    cat seen; not grep wrong seen && [ "$(grep -c right seen)" -ge 20 ]'
	check "$type: memory: $(load_most) KiB, all in the first seconds" '
	    cat seen; [ "$(load_most)" -lt 3072 ] &&
	    [ "$(sed -n 6p seen | cut -d " " -f 1)" -ge \
		$(($(load_most) - 64)) ]'
	check "$type: 250 silent peers take no time: $idle/100 s of 4 s" '
	    [ "$idle" -le 20 ]'
	check "$type: when the load is over it rests" '
	    tail -n 3 seen | cut -d " " -f 2 >rest && cat rest &&
	    [ $(($(tail -n 1 rest) - $(head -n 1 rest))) -le 20 ]'
	check "$type: no process and no socket stays" '
	    [ ! -e "/proc/$child" ] && not listening "$port" &&
	    not grep -i "$(printf " 0100007F:%04X " "$port")" /proc/net/udp'
}
load_most() { tail -n 1 seen | cut -d ' ' -f 1; }

# many NAME COUNT CODE...: the code, run COUNT times at once, with $i from 1;
# its exit statuses are in NAME.status, a line each, what it says in NAME.err.
many() {
	job=$1 count=$2 runs='' i=0
	shift 2
	rm -f "$job".[0-9]*
	while [ "$i" -lt "$count" ]; do
		i=$((i + 1))
		{ (eval "$*"); echo $? >"$job.$i.status"; } \
		    </dev/null >"$job.$i.out" 2>"$job.$i.err" &
		runs="$runs $!"
	done
	# shellcheck disable=SC2086	# one word a process
	wait $runs
	cat "$job".*.status | sort | uniq -c >"$job.status"
	cat "$job".*.err >"$job.err"
}
# ended COUNT STATUS...: so many ended so, and no other.
ended() {
	while [ $# -gt 0 ]; do
		printf '%7d %s\n' "$1" "$2"
		shift 2
	done | sort -k 2 | diff - "$job.status" && return
	sort "$job.err" | uniq -c
	return 1
}

pipeline() {
	acme-step new-order -a account "$1" |
	acme-step respond -w "$www" |
	acme-step finalize -K "$2" -o "$3"
}
tidy() { [ -z "$(ls "$www")" ] && [ -z "$(find . -name '.acme-step*')" ]; }

load_pipelines() {
	rm -f account.pem account
	acme-step key -o account.pem && acme-step new-account -y -o account ||
	    exit
	many keys 64 'acme-step key -o "at.$i.pem"'
	check '64 keys, made at once, are 64' '
	    ended 64 0 && for i in $(seq 64); do
		openssl pkey -in "at.$i.pem" -pubout || exit
	    done >publics && [ "$(grep -v -e --- publics | sort -u |
		grep -c "=$")" = 64 ]'
	moment=$(date +%s)
	many pipelines 64 'pipeline "p$i.test" "at.$i.pem" "at.$i.chain"'
	passed=$(($(date +%s) - moment))
	check "none of 64 pipelines fails; they take $passed s" '
	    ended 64 0 && [ ! -s pipelines.err ] && [ "$passed" -lt 60 ]'
	check 'each has its own certificate' '
	    for i in $(seq 64); do
		issued "at.$i.pem" "at.$i.chain" "DNS:p$i.test" || exit
	    done'
	check 'nothing is left in the directories' tidy
	check 'the account is as it was: one more pipeline' '
	    pipeline again.test at.1.pem again.chain &&
	    issued at.1.pem again.chain DNS:again.test'
}

load_collisions() {
	many same 64 'acme-step key -o same.pem'
	check 'of 64 key -o SAME one makes the key, the others exit 73' '
	    ended 1 0 63 73 && openssl pkey -in same.pem -noout -check &&
	    [ "$(stat -c %a same.pem)" = 600 ] && tidy'
	check 'and say why' '
	    [ "$(grep -c "^acme-step: key: .*same.pem.*exists" \
		same.err)" = 63 ]'
	many cron 64 'acme-step due -K same.pem same.chain same.test &&
	    pipeline same.test same.pem same.chain'
	check '64 times "due && pipeline" at once, one file: none fails' '
	    ended 64 0 && [ ! -s cron.err ] &&
	    issued same.pem same.chain DNS:same.test && tidy'
	many later 64 'acme-step due -K same.pem same.chain same.test &&
	    pipeline same.test same.pem same.chain'
	check 'and after that none is due' 'ended 64 1 && tidy'
	many csr 64 'acme-step csr -K "at.$i.pem" -o same.csr "p$i.test"'
	check '64 times -o SAME: the file is whole, and of one of them' '
	    ended 64 0 && [ "$(grep -c BEGIN same.csr)" = 1 ] &&
	    openssl req -in same.csr -noout -verify -text >text &&
	    i=$(sed -n "s/.*DNS:p\([0-9]*\).test$/\1/p" text) &&
	    openssl pkey -in "at.$i.pem" -pubout >want.pub &&
	    openssl req -in same.csr -noout -pubkey | diff want.pub - && tidy'
	web=$(free_port)
	pebble_stop
	pebble_start
	rm -f account
	{ acme-step new-account -y -o account &&
	  acme-step new-order -a account port.test |
	  acme-step challenges -t http-01 >port.todo; } || exit
	many port 64 'acme-step respond -l "127.0.0.1:$web" -s 8 <port.todo'
	check 'of 64 respond -l PORT one listens, the others exit 73' '
	    ended 1 0 63 73 && not listening "$web" &&
	    cat port.*.out | grep -x "status ready"'
	check 'and say why' '
	    [ "$(grep -c "^acme-step: respond: cannot listen on .*in use" \
		port.err)" = 63 ]'
}

# ---------------------------------------------------------------- waits --

# Long waits: a CA that goes away, a machine that is suspended, a clock that
# is set, and a network that changes.
waits() {
	chmod 755 "$tmp"	# for nginx
	world_start
	retry_after=30
	pebble_start PEBBLE_WFE_NONCEREJECT=0
	unset ACME_TIMEOUT
	ACME_KEY=$tmp/account.pem
	export ACME_KEY
	acme-step key -o account.pem && acme-step key -o leaf.pem &&
	    acme-step new-account -y -o account || exit
	fast_build
	waits_hour
	pebble_stop
	retry_after=1
	pebble_start PEBBLE_VA_NOSLEEP=0 PEBBLE_VA_SLEEPTIME=3
	acme-step new-account -y -o account || exit
	waits_suspended
	pebble_stop
	waits_dhcp
	finish
}

# The program in whose process an hour takes a minute: its clocks run SPEED
# times as fast, and its waits are that much shorter.  BASE is when the fast
# clock showed the right time; the file WALL has the seconds by which the
# clock with the date is set off besides.  The functions are defined here,
# not renamed, since BearSSL asks for the time, too.
speed=60
fast_build() {
	cat >fast.c <<-'END'
	#define _GNU_SOURCE
	#include <sys/syscall.h>
	#include <sys/time.h>
	#include <poll.h>
	#include <stdio.h>
	#include <stdlib.h>
	#include <time.h>
	#include <unistd.h>
	static long long speed, base;
	static char wall[4096];
	/* Some of its processes overwrite their environment. */
	__attribute__((constructor)) static void
	begin(void)
	{
		speed = atoll(getenv("SPEED"));
		base = atoll(getenv("BASE"));
		snprintf(wall, sizeof wall, "%s", getenv("WALL"));
	}
	int
	clock_gettime(clockid_t id, struct timespec *t)
	{
		long long ns;

		if (id == CLOCK_REALTIME) {
			t->tv_sec = time(NULL);
			t->tv_nsec = 0;
			return 0;
		}
		syscall(SYS_clock_gettime, id, t);
		ns = (t->tv_sec * 1000000000LL + t->tv_nsec) * speed;
		t->tv_sec = ns / 1000000000;
		t->tv_nsec = ns % 1000000000;
		return 0;
	}
	int
	poll(struct pollfd *p, nfds_t n, int ms)
	{
		long long ns = ms * 1000000LL / speed + 1;
		struct timespec t = { ns / 1000000000, ns % 1000000000 };

		return ppoll(p, n, ms < 0 ? NULL : &t, NULL);
	}
	unsigned
	alarm(unsigned seconds)
	{
		long long us = seconds * 1000000LL / speed;
		struct itimerval t = { { 0, 0 },
		    { us / 1000000, us % 1000000 } };

		setitimer(ITIMER_REAL, &t, NULL);
		return 0;
	}
	time_t
	time(time_t *to)
	{
		FILE *f = fopen(wall, "r");
		long long off = 0;
		struct timespec t;

		syscall(SYS_clock_gettime, CLOCK_REALTIME, &t);
		if (f) {
			fscanf(f, "%lld", &off);
			fclose(f);
		}
		t.tv_sec = base + (t.tv_sec - base) * speed + off;
		if (to)
			*to = t.tv_sec;
		return t.tv_sec;
	}
	#include "acme.c"
	END
	cc -w -I"$src" fast.c -o bin/fast -lbearssl || exit
}
# fast STEP...: with its clock, and for 90 real seconds at most.
fast() {
	SPEED=$speed BASE=$base WALL=$tmp/$case/wall \
	    timeout -s KILL 90 fast "$@"
}

# begin_case NAME: a directory, in which there is a pending order for the name
# NAME.test at a CA whose port is $port.
begin_case() {
	case=$1
	mkdir -p "$case" && cd "$case" || exit
	sed "s|localhost:$pebble/|localhost:$port/|" ../account >account
	ACME_DIRECTORY=https://localhost:$port/dir
	ACME_KEY=$tmp/account.pem
	ACME_CA_FILE=$tmp/${trusted:-ca.pem}
	export ACME_DIRECTORY ACME_KEY ACME_CA_FILE
	acme-step new-order -a account -o order "$case.test" || exit
	began=$(date +%s%3N)
}
# end_case PROCESS: how it ends, and after how many ms.
end_case() {
	wait "$1"
	got=$?
	echo "$got $(($(date +%s%3N) - began))" >ended
}
# at SECONDS: until so many have passed since the case began.
at() {
	left=$((began + $1 * 1000 - $(date +%s%3N)))
	[ "$left" -le 0 ] || sleep "$(printf '%d.%03d' $((left / 1000)) \
	    $((left % 1000)))"
}
# signal NAME PROCESS: to a process, or with a minus sign a group, that this
# shell started and that still runs: numbers are soon used again.
signal() {
	[ "$(sed -n 's/^PPid:[^0-9]*//p' "/proc/${2#-}/status")" = \
	    "$(sh -c 'echo "$PPID"')" ] && kill "-$1" "$2"
}
# A relay before the CA, in a group of processes of its own: it can be ended,
# and stopped, which leaves a CA that accepts and says nothing.
relay_up() {
	setsid socat "TCP-LISTEN:$port,bind=127.0.0.1,fork,reuseaddr" \
	    "TCP:127.0.0.1:$pebble" </dev/null >>relay.log 2>&1 &
	relay=$!
	await listening "$port"
}
relay() { signal "$1" "-$relay"; }
# hour: the step that waits for an hour, in the background.
hour() {
	fast finalize -v -K ../leaf.pem -T 3600 -o chain <order 2>err &
	step=$!
}
# The rest of a case: the order's challenges are answered.
answered() { acme-step respond -w "$www" -T 60 <order >ready 2>respond.err; }

case_silent() {
	port=$(free_port); relay_up
	begin_case silent
	hour
	at 5; relay STOP; at 20; relay CONT; at 22; answered
	end_case "$step"; relay TERM
}
case_mute() {
	port=$(free_port); relay_up
	begin_case mute
	hour
	at 5; relay STOP
	end_case "$step"; relay KILL
}
case_refused() {
	port=$(free_port); relay_up
	begin_case refused
	hour
	at 5; relay TERM
	end_case "$step"
	at 12; relay_up
	mv err first; hour
	at 15; answered
	wait "$step"; echo $? >again; relay TERM
}
# The CA is away while the step waits for something else.
case_settle() {
	port=$(free_port); relay_up
	begin_case settle
	fast respond -w "$www" -s 1200 -T 3600 <order >ready 2>err & step=$!
	at 5; relay TERM; at 15; relay_up
	end_case "$step"
	acme-step finalize -K ../leaf.pem -o chain <ready 2>>err; relay TERM
}
case_alone() {
	port=$(free_port); relay_up
	begin_case alone
	fast order -W -T 3600 <order >out 2>err & step=$!
	end_case "$step"; relay TERM
}
# A web server before the CA, which is away while there is a file.
front() {
	mkdir -p "$1"
	port=$(free_port)
	cat >>front.conf <<-END
	server {
		listen 127.0.0.1:$port ssl;
		keepalive_requests 4;
		location / {
			if (-f $tmp/$1/away) {
				add_header Retry-After "$2" always;
				return 503;
			}
			proxy_pass https://127.0.0.1:$pebble;
			proxy_set_header Host \$http_host;
			proxy_hide_header Retry-After;
			${3:+add_header Retry-After \"$3\" always;}
		}
	}
	END
	echo "$port" >"$1.port"
}
fronts() {
	later=$(date -u -d "@$((base + 43200 + 1500))" '+%a, %d %b %Y %T GMT')
	cat >front.conf <<-END
	daemon off; pid front.pid; error_log front.log;
	worker_processes 1; events { worker_connections 999; }
	http {
	access_log off;
	client_body_temp_path scratch; proxy_temp_path scratch;
	fastcgi_temp_path scratch; uwsgi_temp_path scratch;
	scgi_temp_path scratch;
	ssl_certificate server.pem; ssl_certificate_key server.key;
	END
	front busy 600
	front full 600
	front ahead "$later"
	front behind "$later"
	front jumps 1 "$later"
	echo '}' >>front.conf
	be_server nginx -p "$tmp/" -e front.log -c front.conf \
	    >>servers.log 2>&1 &
	pids="$pids $!"
	up "$port"
}
case_busy() {
	port=$(cat busy.port)
	begin_case busy
	hour
	at 5; : >away; at 20; rm away; at 22; answered
	end_case "$step"
}
case_full() {
	port=$(cat full.port)
	begin_case full
	hour
	at 5; : >away
	end_case "$step"
}
case_ahead() {
	port=$(cat ahead.port)
	begin_case ahead
	echo 61200 >wall
	hour
	at 5; : >away; at 15; rm away; at 17; answered
	end_case "$step"
}
case_behind() {
	port=$(cat behind.port)
	begin_case behind
	echo 25200 >wall
	hour
	at 5; : >away
	end_case "$step"
}
# The clock with the date jumps by ten hours, both ways, all the time.
case_jumps() {
	port=$(cat jumps.port)
	begin_case jumps
	while :; do
		echo 25200 >wall; sleep 0.3; echo 61200 >wall; sleep 0.3
	done & jumper=$!
	hour
	at 20; answered
	end_case "$step"
	signal TERM "$jumper"
}

# outcome NAME STATUS FROM TO: the case ended so, after seconds in this range.
outcome() {
	cat cases.log "$1/err" "$1/respond.err" 2>&1
	echo "ended: $(cat "$1/ended") (wanted: $2, $3 to $4 s)"
	read -r got ms <"$1/ended"
	[ "$got" = "$2" ] && [ "$ms" -ge $(($3 * 1000)) ] &&
	    [ "$ms" -le $(($4 * 1000)) ]
}
certified() { issued leaf.pem "$1/chain" "DNS:$1.test"; }

waits_hour() {
	base=$(date +%s)
	cases='silent mute refused settle alone busy full ahead behind jumps'
	# Their certificates are valid before and after all jumps.
	mkdir -p scratch
	fronts
	runs=''
	for case in $cases; do
		("case_$case") >>cases.log 2>&1 & runs="$runs $!"
	done
	# shellcheck disable=SC2086	# one word a process
	wait $runs
	group 'waits: an hour, in which the CA goes away'
	check 'it accepts and says nothing for a quarter, and comes back' '
	    outcome silent 0 22 40 && certified silent'
	check 'and does not come back: 69, at the end of the hour' '
	    outcome mute 69 55 65 && grep "time limit of 3600 s" mute/err'
	check 'it refuses connections: 69, at once' '
	    outcome refused 69 5 10 && grep "cannot connect" refused/first'
	check 'and the step, run again when the CA is back, goes on' '
	    [ "$(cat refused/again)" = 0 ] && certified refused'
	check 'it is away while a step waits for something else' '
	    outcome settle 0 20 30 && certified settle'
	check 'it is there, but nothing comes of the order: 75' '
	    outcome alone 75 55 65 && grep "still pending" alone/err'
	check 'it is busy (503, Retry-After) for a quarter' '
	    outcome busy 0 22 40 && grep " 503" busy/err && certified busy'
	check 'it stays busy: 75, when less is left than it asks for' '
	    outcome full 75 45 65 && grep "again after 600 s" full/err'
	group 'waits: an hour, in which the clock is set'
	check 'Retry-After is a date, and the clock is five hours fast' '
	    outcome ahead 0 17 35 && grep " 503" ahead/err && certified ahead'
	check 'five hours slow: 75, at once, with what the CA asks for' '
	    outcome behind 75 5 10 && grep "again after [12]" behind/err'
	check 'it jumps by ten hours, to and fro' '
	    outcome jumps 0 20 40 && certified jumps'
}

# The real program, and the real clock.  stop PROCESS SECONDS: it, or with a
# minus sign its group, is suspended for so long.
stop() {
	signal STOP "$1" && sleep "$2" && signal CONT "$1"
}
case_pipeline() {
	case=pipeline.$1
	mkdir "$case" && cd "$case" || exit
	ms=$(($1 * 15))
	setsid sh -c 'acme-step new-order -a ../account "$1" |
	    acme-step respond -w "$2" | acme-step finalize -K ../leaf.pem \
		-o chain' sh "$case.test" "$www" 2>err & step=$!
	sleep "0.$(printf %03d "$ms")"
	stop "-$step" 2 && echo stopped >stopped
	wait "$step"
	echo $? >ended
}
# The step is stopped while it makes a connection, whose other end says
# nothing yet, and for longer than that.
case_opening() {
	port=$(free_port); relay_up
	began=$(date +%s%3N)
	mkdir opening && cd opening || exit
	relay STOP
	acme-step directory -T 30 -d "https://localhost:$port/dir" >out 2>err &
	step=$!
	sleep 1
	signal STOP "$step"; sleep 1; relay CONT; sleep 2; signal CONT "$step"
	end_case "$step"; relay TERM
}
# While its request is under way.
case_asking() {
	port=$(free_port); relay_up
	begin_case asking
	acme-step order -W -T 30 <order >out 2>err & step=$!
	sleep 1; relay STOP; sleep 6
	signal STOP "$step"; sleep 1; relay CONT; answered; signal CONT "$step"
	end_case "$step"; relay TERM
}
# The process that answers is stopped, when the CA asks it.
case_responder() {
	port=$pebble
	begin_case responder
	acme-step respond -t http-01 -l "127.0.0.1:$own_web" -T 60 <order \
	    >out 2>err & step=$!
	await listening "$own_web"
	await pgrep -P "$step"
	child=$(pgrep -P "$step")
	kill -STOP "$child" && sleep 3 && kill -CONT "$child"
	end_case "$step"
}
# It is stopped for longer than its time.
case_over() {
	port=$pebble
	begin_case over
	acme-step order -W -T 4 <order >out 2>err & step=$!
	at 2; signal STOP "$step"; at 8; signal CONT "$step"
	end_case "$step"
}
case_published() {
	port=$pebble
	begin_case published
	mkdir www
	acme-step respond -w www -s 5 -T 8 <order >out 2>err & step=$!
	at 2; ls www >before; signal STOP "$step"; at 10; signal CONT "$step"
	end_case "$step"
	ls www >after
}
waits_suspended() {
	runs=''
	for case in opening asking over published; do
		("case_$case") >>cases.log 2>&1 & runs="$runs $!"
	done
	for number in $(seq 32); do
		(case_pipeline "$number") >>cases.log 2>&1 & runs="$runs $!"
	done
	# shellcheck disable=SC2086	# one word a process
	wait $runs
	group 'waits: a machine that is suspended'
	check "32 pipelines, each for 2 s at another moment: none fails" '
	    cat pipeline.*/err
	    for i in $(seq 32); do
		[ "$(cat "pipeline.$i/ended")" = 0 ] &&
		issued leaf.pem "pipeline.$i/chain" "DNS:pipeline.$i.test" ||
		exit
	    done'
	check "$(cat pipeline.*/stopped | grep -c .) of them were" '
	    [ "$(cat pipeline.*/stopped | grep -c .)" -ge 24 ]'
	check 'nothing is left in the web server' '[ -z "$(ls "$www")" ]'
	check 'while it connects' '
	    outcome opening 0 4 8 && grep new-order opening/out'
	check 'while a request is under way' '
	    outcome asking 0 8 20 && grep "^status ready" asking/out'
	check 'for longer than its time: it ends when it is awake' '
	    outcome over 75 8 10 && grep "time limit of 4 s" over/err'
	check 'and removes what it published' '
	    outcome published 75 10 12 && [ -s published/before ] &&
	    [ ! -s published/after ]'
	pebble_stop
	own_web=$(free_port) old_web=$web
	web=$own_web
	pebble_start PEBBLE_VA_NOSLEEP=0 PEBBLE_VA_SLEEPTIME=2
	web=$old_web
	acme-step new-account -y -o account
	(case_responder) >>cases.log 2>&1
	check 'the process that answers, while the CA asks it' '
	    outcome responder 0 3 15 && grep "^status ready" responder/out'
}

# A network whose name servers change: the CA is at pebble.test, behind a
# relay.  All is in namespaces, with an /etc of their own.
waits_dhcp() {
	server=$(free_port)
	web=80
	cp -a /etc etc
	echo '127.0.0.1 localhost' >etc/hosts
	cat >dhcp.json <<-END
	{ "pebble": {
		"listenAddress": "127.0.0.1:14000",
		"managementListenAddress": "127.0.0.1:15000",
		"certificate": "server.pem", "privateKey": "server.key",
		"httpPort": 80, "tlsPort": 443, "keyAlgorithm": "ecdsa",
		"retryAfter": { "authz": 1, "order": 1 },
		"profiles": { "default": {
			"description": "x", "validityPeriod": 7776000 } }
	} }
	END
	cat >dhcp.sh <<-'END'
	busybox ip link set lo up
	mount --bind etc /etc
	bin=$1 www=$2 started=
	trap 'kill $started $names -$relay' EXIT
	# names NUMBER: the name server 127.0.0.NUMBER, instead of the old one.
	names() {
		[ ! "$names" ] || kill "$names"
		"$bin/pebble-challtestsrv" -dnsserver "127.0.0.$1:53" \
		    -management "127.0.0.$1:8055" -http01 '' -https01 '' \
		    -tlsalpn01 '' -doh '' -defaultIPv4 127.0.0.1 \
		    -defaultIPv6 '' &
		names=$!
	}
	relay_up() {
		if [ "$relay" ]; then
			kill -TERM "-$relay"
			wait "$relay"
		fi
		setsid socat TCP-LISTEN:8443,bind=127.0.0.1,fork,reuseaddr \
		    TCP:127.0.0.1:14000 &
		relay=$!
		until ready ':20FB 0*:0000 0A'; do
			sleep 0.05
		done
	}
	ready() { grep -qi "$1" /proc/net/tcp; }
	"$bin/pebble-challtestsrv" -dnsserver 127.0.0.9:53 \
	    -management 127.0.0.9:8055 -http01 '' -https01 '' -tlsalpn01 '' \
	    -doh '' -defaultIPv4 127.0.0.1 -defaultIPv6 '' &
	started="$started $!"
	PEBBLE_VA_NOSLEEP=1 PEBBLE_AUTHZREUSE=0 "$bin/pebble" \
	    -config dhcp.json -dnsserver 127.0.0.9:53 &
	started="$started $!"
	busybox httpd -f -p 127.0.0.1:80 -h "$3" &
	started="$started $!"
	names 2
	relay_up
	echo nameserver 127.0.0.2 >/etc/resolv.conf
	until ready ':36B0 ' && ready '0200007F:1F77 '; do
		sleep 0.1
	done
	ACME_CA_FILE=ca.pem ACME_KEY=account.pem ACME_TIMEOUT=30
	ACME_DIRECTORY=https://pebble.test:8443/dir
	export ACME_CA_FILE ACME_KEY ACME_TIMEOUT ACME_DIRECTORY
	acme-step new-account -y -o net.account || exit
	# wait_in NAME CODE...: a step waits, and the code runs meanwhile, after
	# which the old connections are gone.
	wait_in() {
		name=$1; shift
		acme-step new-order -a net.account -o "$name.order" \
		    "$name.test" || exit
		acme-step respond -w "$www" -s 5 <"$name.order" \
		    >"$name.out" 2>"$name.err" & step=$!
		sleep 1
		eval "$*"
		relay_up
		wait "$step"
		echo $? >"$name.ended"
	}
	dhcp() {
		echo "nameserver 127.0.0.$1" >/etc/resolv.new
		mv /etc/resolv.new /etc/resolv.conf
	}
	wait_in changed 'names 3; dhcp 3'
	wait_in missing 'names 4; rm /etc/resolv.conf; sleep 2; dhcp 4'
	wait_in half 'names 5; printf "nameserver 127.0." >/etc/resolv.conf
	    sleep 2; echo 0.5 >>/etc/resolv.conf'
	wait_in late 'names 6; (sleep 6; dhcp 6) &'
	acme-step respond -w "$www" <late.order >late.out 2>late.again
	echo $? >late.then
	wait_in gone 'names 7; rm /etc/resolv.conf; (sleep 6; dhcp 7) &'
	acme-step respond -w "$www" <gone.order >gone.out 2>gone.again
	echo $? >gone.then
	END
	unshare -nm sh dhcp.sh "$bin" "$www" "$tmp/www" \
	    >dhcp.log 2>&1
	group 'waits: DHCP changes /etc/resolv.conf'
	check 'the old name server is dead, the new one answers' '
	    found changed 0'
	check 'the file is missing for a moment' 'found missing 0'
	check 'it is half written for a moment' 'found half 0'
	check 'it changes after the question was sent: 69, and then 0' '
	    found late 69 && [ "$(cat late.then)" = 0 ]'
	check 'it is missing when the question is sent: the same' '
	    found gone 69 && [ "$(cat gone.then)" = 0 ]'
}
# found NAME STATUS: the step ended so; with 0, its order is ready.
found() {
	tail -n 20 dhcp.log
	cat "$1.err"
	got=$(cat "$1.ended")
	echo "ended: $got"
	[ "$got" = "$2" ] && grep "^status ready" "$1.out"
}

# ----------------------------------------------------------------- fuzz --

# The commands of whole steps, in the order in which they are recorded
# before Pebble.  The first word is the standard input; rN is what line N
# printed.  A variable can come before the command.
fuzz_commands() {
	cat <<-EOF
	- directory
	- new-account -y -m mailto:ops@example.com
	- new-account -v -e eab -m mailto:ops@example.com
	- account -m mailto:b@example.com
	- new-order -a r2 a.test 127.0.0.1
	r5 challenges -a r2
	r5 order -v
	r5 respond -t http-01 -w www
	r8 finalize -K example.pem
	r5 certificate
	- renewal-info r9
	- new-order -v -a r2 -p shortlived -R r9 b.test
	- new-order -r example.csr
	r13 respond -t http-01 -w www -s 1
	r14 finalize -r example.csr -i Nobody
	- new-order -a r2 *.b.test
	r16 respond -t dns-01
	- new-authz -a r2 b.test
	- new-order -a r2 c.test
	r19 deactivate-authz
	- get -a r2 $ACME_DIRECTORY
	empty.json post -a r2 $ACME_DIRECTORY
	- new-order -a r2 d.test
	r23 respond -t http-01 -x ./true
	- revoke-cert -a r2 -c superseded r9
	- revoke-cert -K example.pem r9
	- https_proxy=http://user:s3cr3t@proxy.test:3128 directory
	- key-change -a r2 -K other.pem
	- account -k other.pem -D
	EOF
}

# record_steps: run these commands in a directory "files", which they leave
# their results in, and write what the CA said to seeds/step, as the target
# step reads it.  The box (-B) keeps the responses.
record_steps() {
	mkdir -p files seeds/step
	cd files || return
	ln -s "$www" www
	ca_host=localhost:$pebble
	acme-step key -o account.pem && acme-step key -o example.pem &&
	acme-step key -t ec384 -o other.pem &&
	acme-step csr -K example.pem c.test >example.csr &&
	printf '{}' >empty.json && printf '#!/bin/sh\n' >true &&
	chmod +x true && echo "kid-1 $mac_key" >eab &&
	chmod 600 eab || return
	fuzz_commands >commands
	n_command=0
	while read -r in words <&3; do
		n_command=$((n_command + 1))
		record_step
	done 3<commands
	rm -rf box www
	echo '- send box' >>commands
	extra=0
	response 1.response >../responses
	rm 1.response
	seed_of_step "$n_command" ../responses
	sed -i "s/$ca_host/localhost:14000/g" ./*
	cd ..
}

# record_step: one of them, from $in, until no request lacks a response.
record_step() {
	rm -rf box
	variable=
	case $words in *=*\ *)
		variable=${words%% *} words=${words#* } ;;
	esac
	[ "$in" != - ] || in=/dev/null
	command=${words%% *} words=${words#"$command"}
	set -f
	# shellcheck disable=SC2086	# the words of the command
	set -- $words
	set +f
	while
		acme-step "$command" -B box "$@" <"$in" >"r$n_command" \
		    2>>../log.steps
		got=$?
		[ "$got" = 75 ]
	do
		acme-step send box || break
	done
	echo "exit status $got of $command" >>../log.steps
	[ "$n_command" != 1 ] || cp box/1.request box/1.response .
	for extra in 0 1 2 3 4 5; do
		box_responses >../responses
		seed_of_step $((n_command - 1)) ../responses
	done
}

# box_responses: as the target step reads them.  Without a box a step may
# ask for one nonce more: after response $extra.
box_responses() {
	case $variable in
	https_proxy*)	printf 'HTTP/1.1 200 OK\r\n\r\n\0n' ;;
	esac
	i=1
	while [ -e "box/$i.response" ]; do
		response "box/$i.response"
		[ "$i" != "$extra" ] ||
		    printf 'HTTP/1.1 200 \r\nReplay-Nonce: abc\r\n\r\n\0n'
		i=$((i + 1))
	done
	response "box/$((i - 1)).response"
}
response() {
	head -c -61 "$1"	# all but its check
	printf '\0n'
}

# seed_of_step NUMBER RESPONSES: not cut, to a file and to a pipe, and cut.
seed_of_step() {
	for how in 0 1 7; do
		[ "$how" = 1 ] || [ "$extra" = 0 ] || continue
		{ printf "\\$(printf %o "$1")\\$how"
		  sed "s/$ca_host/localhost:14000/g" "$2"
		} >"../seeds/step/$1.$how.$extra"
	done
}

# seed TARGET NAME [BYTES]: what printf makes of BYTES, and standard input.
seed() {
	mkdir -p "seeds/$1"
	# shellcheck disable=SC2059	# its escapes
	{ printf "${3-}"; cat; } >"seeds/$1/$2"
}

# Seeds for all targets, from what the tests use: openssl's keys and
# certificates, the words of the CA and of our program, README's examples.
make_seeds() {
	record_steps || return
	cp ca.pem server.pem files
	hostile_seeds
	for file in seeds/step/*.7.0; do
		name=${file##*/}
		tail -c +3 "$file" | sed 's/\x00n//g' >stream
		seed http "$name" '\252\0' <stream
		seed http "$name.cut" '\252\7' <stream
		seed box "$name" '\1' <stream
		grep -a '^{' stream >"$name.json" || continue
		seed json "$name" '.\n' <"$name.json"
		seed quote "$name" <"$name.json"
	done
	for file in files/r*; do
		name=${file##*/}
		if grep -q '^end$' "$file"; then
			seed record "$name" '\0' <"$file"
			seed record "$name.account" '\1' <"$file"
		elif grep -q CERTIFICATE "$file"; then
			certificate_seeds "$file"
		fi
	done
	certificate_seeds ca.pem
	certificate_seeds server.pem
	key_seeds
	seed box request '\0' <files/1.request
	greeting_seeds
	# Commands: what the README shows.
	sed -n 's/^ *acme-step \([^|<>&]*\).*/\1/p' "$src/README" |
	sort -u | while read -r words; do
		echo "$words" | tr -s ' ' '\n' >line
		seed args "$(cksum <line | cut -d' ' -f1)" 'r5\n' <line
	done
	table_of_seeds | while read -r target name bytes; do
		seed "$target" "$name" "$bytes" </dev/null
	done
}

# hostile_seeds: those of steps, with URLs of others, and more.
hostile_seeds() {
	for path in order authZ my-order finalize certZ chalZ my-account \
	    list-order nonce revoke rollover draft; do
		hostile "$path" "s|localhost:14000/$path|evil.test/$path|"
		hostile "$path.port" "s|:14000/$path|:14001/$path|"
	done
	hostile control 's/"detail": "/&\\u001b[1m\\u202e/'
	hostile status 's/"status": "/&\\u009b\\n/'
	hostile token 's|"token": "|&../|'
	redirected one evil.test
	redirected two evil.test other.test
}
redirected() {
	name=$1
	shift
	{ printf '\0\1'
	  for host; do
		printf 'HTTP/1.1 302 \r\nLocation: https://%s/\r\n' "$host"
		printf 'Content-Length: 0\r\n\r\n\0n'
	  done
	  tail -c +3 seeds/step/0.0.0
	} >"seeds/step/redirect.$name"
}
hostile() {
	for recorded in seeds/step/*.1.0; do
		sed "$2" "$recorded" >hostile
		cmp -s hostile "$recorded" || cp hostile "$recorded.$1"
	done
}

certificate_seeds() {
	name=${1##*/}
	seed cert "$name" <"$1"
	seed due "$name" <"$1"
	seed chain "$name" <"$1"
	cat "$1" ca.pem | seed validate "$name"
	openssl x509 -in "$1" -outform DER -out cert.der
	seed cert "$name.der" <cert.der
	head -c -2 cert.der | seed cert "$name.short"
	seed due "$name.der" <cert.der
	sed 's/b\.test/b\x1btest/g' cert.der | seed due "$name.control"
}

# Keys and requests in all forms that are read.
key_seeds() {
	net='excluded;IP:10.0.0.0/255.0.0.0'
	openssl genrsa -out rsa.pem 2048 2>>log.steps
	openssl ec -in files/other.pem -out sec1.pem 2>>log.steps
	for file in rsa.pem sec1.pem files/account.pem files/other.pem; do
		name=${file##*/}
		seed key "$name" <"$file"
		openssl req -new -key "$file" -subj /O=x/CN=a.test -addext \
		    'subjectAltName=DNS:b.test,IP:192.0.2.7,email:a@b' |
		seed csr "$name"
		openssl req -new -key "$file" -subj /CN=a.test -outform DER |
		seed csr "$name.der"
		openssl req -x509 -key "$file" -subj /CN=a.test \
		    -addext "nameConstraints=permitted;DNS:.a.test,$net" \
		    -addext subjectAltName=DNS:a.test,DNS:b.test \
		    -addext extendedKeyUsage=serverAuth -days 3650 >own.pem
		certificate_seeds own.pem
	done
	seed csr ours <files/example.csr
	openssl pkcs8 -topk8 -passout pass:x -in rsa.pem |
	seed key encrypted
}

# What openssl sends to a TLS responder.
greeting_seeds() {
	hello=$(free_port)
	server_start timeout 20 socat -u "TCP-LISTEN:$hello,bind=127.0.0.1" \
	    OPEN:hello,creat
	up "$hello"
	timeout 1 openssl s_client -connect "127.0.0.1:$hello" -tls1_2 \
	    -servername a.test -alpn acme-tls/1 </dev/null >>log.steps 2>&1
	seed responder tls '\1\0' <hello
	seed responder tls.proxied \
	    '\4\7\r\n\r\n\0\r\nQUIT\n\41\0\0\0' <hello
}

# Lines of a target, a name, and bytes for printf.
table_of_seeds() {
	path=/.well-known/acme-challenge/token-1234567890123456789
	question='\17_acme-challenge\1a\4test\0\0\20\0\1'
	ask="\\22\\64\\0\\0\\0\\1\\0\\0\\0\\0\\0\\0$question"
	answer="\\22\\64\\204\\0\\0\\1\\0\\1\\0\\0\\0\\0$question"
	answer=$answer'\300\14\0\20\0\1\0\0\0\0\0\4\3abc'
	all='HTTP/1.1 201 Created\r\nLocation: /a\r\nRetry-After: 7\r\n'
	all=$all'Replay-Nonce: abc\r\nLink: </b>;rel=next\r\n'
	all=$all'Content-Length: 2\r\n\r\n{}'
	cat <<END
json path a.1.b\n{"a":[1,{"b":"\\\\u00e9\\\\ud83d\\\\ude00\\\\n\\\\/"}]}
json array .\n["a",1,-0.5e+3,true,null,[],{}]
box post \0# protected: {}\nPOST https://ca.test/a HTTP/1.1\r\n\
Content-Length: 2\r\n\r\n{}
box all \1$all
http all \252\7$all
request names Me\na.test\n*.b.test\n192.0.2.7\n2001:db8::1
request none \na.test
question plain \1$ask
question edns \1\22\64\0\0\0\1\0\0\0\0\0\1$question\
\0\0\51\4\320\0\0\0\0\0\0
question long \1\22\64\0\0\0\1\0\0\0\0\0\0\
\23_validation-persist\1b\1a\4test\0\0\20\0\1
question tcp \0$ask
answer txt $answer
look dns \1\0\0\110$answer\0\110$answer\0\110$answer
look http \0\0HTTP/1.1 200 OK\r\nContent-Length: 31\r\n\r\n\
token-1234567890123456789.thumb
look redirect \0\0HTTP/1.1 302 Found\r\n\
Location: http://b.test/c\r\n\r\n
responder http \0\0GET $path HTTP/1.1\r\n\r\n
responder proxied \3\7PROXY TCP4 1.2.3.4 5.6.7.8 1 80\r\n\
HEAD $path HTTP/1.1\r\n\r\n
responder dns \2\0\0\60$ask
proxy plain \0HTTP/1.1 200 OK\r\n\r\n\26\3\1
proxy control \200HTTP/1.1 403 \033[1m\302\233\342\200\256\r\n\r\n
proxy interim \7HTTP/1.1 100 Continue\r\n\r\n\
HTTP/1.0 407 user s3cr3t\r\nVia: x\r\n\r\n
link one <https://ca.test/c/1>;rel="alternate"
link list </2>; rel=next; title="a,b;c", <//b.test/3>;rel="x next"\n\
Link: <https://ca.test/4>;rel="alternate"
eab quoted kid"\\\\1 $mac_key\n
eab two kid-1 $mac_key\n
time rfc3339 \0002026-11-24T01:02:03.5+01:00
time http \1Sun, 06 Nov 1994 08:49:37 GMT
time utc \006261124010203Z
time generalized \00220261124010203Z
time seconds \003120
url plain https://www.example.com:8443/a?b\n/c\n\
user:p%%40w@proxy.corp:3128
url ip https://[2001:db8::1]/a\n//b.test/c\nhttp://10.0.0.1:80/
url network https://a.test\n10.0.0.0/8
END
}
# A dictionary of the words in acme.c: members, keywords, headers, options.
fuzz_words() {
	grep -o '"[-A-Za-z0-9:/._ ]\{3,32\}"' "$source/acme.c" | sort -u
	printf '"%s"\n' '\x00n' '\x00c' '\x00e' '\x0d\x0a' '\x1b[' '\x7f' \
	    '\xc2\x9b' '\xe2\x80\xae' '\\u001b' 'https://evil.test/'
}

# One program, whose name chooses the target.  Zero is added to a null
# pointer, that of NONE, in many places: no machine minds, but clang does.
fuzz_build() {
	sanitizers='-g -O1 -fsanitize=address,undefined
	    -fno-sanitize=pointer-overflow -fno-sanitize-recover=all
	    -fno-pie'
	fuzz_oracle >oracle.c
	fuzz_source >fuzz.c
	grep '^#include' "$source/acme.c" >system.h
	# shellcheck disable=SC2086	# options
	clang $sanitizers -c oracle.c &&
	clang $sanitizers -fsanitize=fuzzer -no-pie -std=gnu99 -w \
	    -D_GNU_SOURCE -include ./system.h -I "$source" \
	    -isystem /usr/include/bearssl -o fuzz fuzz.c oracle.o \
	    -lbearssl -lcrypto -lresolv
}

fuzz() {
	chmod 755 "$tmp"
	kept=$cache/fuzz
	seconds=${FUZZ_SECONDS:-10}
	source=${FUZZ_SOURCE-$src}
	group 'fuzz: build, and record seeds before Pebble'
	wanted=yes
	check 'clang builds the targets' fuzz_build
	[ -x fuzz ] || finish
	if [ ! -e "$kept/seeds" ]; then
		world_start
		pebble_start PEBBLE_ALTERNATE_ROOTS=1 PEBBLE_WFE_NONCEREJECT=0
		rm -rf files seeds
		check 'seeds' 'make_seeds; got=$?; cat log.steps; [ $got = 0 ]'
		mkdir -p "$kept"
		cp -R files "$kept/files"
		cp -R seeds "$kept/seeds"
	fi
	FUZZ_FILES=$kept/files
	export FUZZ_FILES
	fuzz_words >words
	mkdir targets
	for target in $(./fuzz | grep -Ee "${ONLY-}"); do
		ln -s ../fuzz "targets/$target"
	done
	[ ! -e targets/step ] || check 'recorded steps succeed' replayed
	set --
	for target in targets/*; do
		target=${target#targets/}
		fuzz_target "$target" &
		pids="$pids $!"
		set -- "$@" "$target"
		[ $# -ge "$(nproc)" ] || continue
		fuzz_results "$@"
		set --
	done
	fuzz_results "$@"
	finish
}

# fuzz_target TARGET: for some seconds, from the seeds, what earlier runs
# found, and what failed in them.
fuzz_target() {
	mkdir -p "$kept/$1/found" "$kept/$1/failed"
	"targets/$1" -max_total_time="$seconds" -timeout=10 \
	    -rss_limit_mb=2048 -max_len=32768 -detect_leaks=0 -dict=words \
	    -artifact_prefix="$kept/$1/failed/" -print_final_stats=1 \
	    "$kept/$1/found" "$kept/$1/failed" "$kept/seeds/$1" \
	    >"$1.log" 2>&1 </dev/null &
	trap 'kill $!' TERM
	wait $!
	echo $? >"$1.status"
}

# fuzz_results TARGET...: wait for them, and report.
fuzz_results() {
	for target; do
		until [ -e "$target.status" ]; do sleep 0.2; done
		runs=$(sed -n 's/^stat::number_of_executed_units: *//p' \
		    "$target.log")
		cover=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$target.log" |
		    tail -n 1)
		check "$target: ${runs:-no} runs, ${cover:-no} edges" '
		    grep -v "^#[0-9]" "$target.log" | tail -n 60
		    [ "$(cat "$target.status")" = 0 ] && [ "$runs" -gt 99 ]'
	done
}

# replayed: with the seeds, steps come to their end, and not only to errors.
replayed() {
	FUZZ_SHOW=1 targets/step -runs=0 "$kept/seeds/step" >shown 2>&1 ||
	    { tail -n 40 shown; return 1; }
	grep -a '^# exit status 0 of' shown | sort | uniq -c | cat
	grep -a '^# exit status' shown | sort | uniq -c | cat
	[ "$(grep -a '^# exit status 0 of' shown | sort -u | wc -l)" -ge 12 ]
}

# What other libraries say of what acme.c reads and makes.
fuzz_oracle() {
	cat <<'END'
/* What other libraries say of what we read or made. */
#include <arpa/nameser.h>
#include <resolv.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <openssl/err.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

/* A certificate in DER, all of it; *end is its notAfter, or -1. */
int
openssl_certificate(const unsigned char *p, size_t n, long long *end)
{
	const unsigned char *at = p;
	X509 *x = d2i_X509(NULL, &at, (long)n);
	struct tm t;
	int ok = x && at == p + n;

	*end = ok && ASN1_TIME_to_tm(X509_get0_notAfter(x), &t) ?
	    timegm(&t) : -1;
	X509_free(x);
	ERR_clear_error();
	return ok;
}

/* Add a line: a name, or the bytes of an address in hexadecimal. */
static int
add(char *to, size_t size, int type, const ASN1_STRING *s)
{
	const unsigned char *p = ASN1_STRING_get0_data(s);
	size_t n = strlen(to), length = (size_t)ASN1_STRING_length(s);

	if (n + 2 * length + 8 > size || (type == GEN_DNS &&
	    memchr(p, 0, length)))
		return 0;
	n += (size_t)sprintf(to + n, type == GEN_DNS ? "dns " : "ip ");
	for (; length > 0; length--)
		n += (size_t)sprintf(to + n, type == GEN_DNS ? "%c" : "%02x",
		    *p++);
	strcpy(to + n, "\n");
	return 1;
}

/* A certificate request, signed by its key; its names as lines. */
int
openssl_request(const unsigned char *p, size_t n, char *names, size_t size)
{
	const unsigned char *at = p;
	X509_REQ *x = d2i_X509_REQ(NULL, &at, (long)n);
	EVP_PKEY *key = x ? X509_REQ_get_pubkey(x) : NULL;
	int ok = key && at == p + n && X509_REQ_verify(x, key) == 1;
	STACK_OF(X509_EXTENSION) *list = ok ? X509_REQ_get_extensions(x) :
	    NULL;
	GENERAL_NAMES *all = X509V3_get_d2i(list, NID_subject_alt_name, NULL,
	    NULL);

	*names = 0;
	for (int i = 0; ok && i < sk_GENERAL_NAME_num(all); i++) {
		const GENERAL_NAME *g = sk_GENERAL_NAME_value(all, i);

		ok = (g->type == GEN_DNS || g->type == GEN_IPADD) &&
		    add(names, size, g->type, g->d.ia5);
	}
	GENERAL_NAMES_free(all);
	sk_X509_EXTENSION_pop_free(list, X509_EXTENSION_free);
	EVP_PKEY_free(key);
	X509_REQ_free(x);
	ERR_clear_error();
	return ok;
}

/* The SubjectPublicKeyInfo of a private key; its length, or 0. */
size_t
openssl_key(const unsigned char *p, size_t n, unsigned char *to, size_t size)
{
	const unsigned char *at = p;
	EVP_PKEY *key = d2i_AutoPrivateKey(NULL, &at, (long)n);
	int length = key && at == p + n ? i2d_PUBKEY(key, NULL) : 0;

	if (length > 0 && (size_t)length <= size)
		i2d_PUBKEY(key, &to);
	EVP_PKEY_free(key);
	ERR_clear_error();
	return length > 0 && (size_t)length <= size ? (size_t)length : 0;
}

/* Can a DNS message be read to its end, and has it so many answers? */
int
libresolv_message(const unsigned char *p, size_t n, size_t *answers)
{
	ns_msg m;
	ns_rr r;

	if (ns_initparse(p, (int)n, &m) != 0)
		return 0;
	*answers = ns_msg_count(m, ns_s_an);
	for (int s = ns_s_an; s < ns_s_max; s++)
		for (int i = 0; i < ns_msg_count(m, s); i++)
			if (ns_parserr(&m, s, i, &r) != 0)
				return 0;
	return 1;
}
END
}

fuzz_source() {
	cat <<'END'
/*
 * Programs for libFuzzer, one for each row of targets[] at the end: the name
 * of the program chooses the row.  acme.c is included, with its system calls
 * replaced: no file, descriptor, process or clock is real, so that a run
 * takes microseconds and is repeatable.
 */
#include <sanitizer/asan_interface.h>

int openssl_certificate(const unsigned char *, size_t, long long *);
int openssl_request(const unsigned char *, size_t, char *, size_t);
size_t openssl_key(const unsigned char *, size_t, unsigned char *, size_t);
int libresolv_message(const unsigned char *, size_t, size_t *);

/* Where the CA is; the only process that is started. */
#define HOME "https://localhost:14000/"
#define PID 4242

static struct {
	char name[64];
	unsigned char *p;
	size_t n;
} file[64] = { { "input" } };
static size_t nfile = 1;

enum kind { FREE, CONTENT, OUTPUT, NETWORK, LOOKUP, OTHER_FD };
enum { ROOM = 1 << 16, PAGE = 4096 };
enum { FDS = 64, PIECE_MAX = 16384, SENT = 1 << 20, CONNECTIONS = 256 };

/* All that belongs to a run, except the state of acme.c. */
static struct {
	sigjmp_buf end;			/* where _exit() returns to */
	int status;
	long long ms, alarm_at;		/* the clock */
	unsigned random;
	struct {
		enum kind kind;
		const unsigned char *p;	/* CONTENT */
		size_t n, at;
		mode_t mode;
	} fd[FDS];
	const unsigned char *net;	/* what all peers send */
	size_t nnet, at;
	unsigned cut;			/* how it is cut into pieces; 0: not */
	bool gap;			/* EAGAIN comes between the pieces */
	bool piped;			/* standard output is one */
	bool real_tls;
	const char *environment;	/* NAME=VALUE, or NULL */
	/* The TLS of a connection: its bytes are not encrypted. */
	size_t have, taken;
	bool closed;
	/* What was written to 1, to 2, and by connection to the network. */
	size_t nout, nerr, nsent, nconnection;
	struct {
		char host[HOST_NAME_MAX + 256];
		unsigned port;
		size_t from;
	} connection[CONNECTIONS];
} w;
static unsigned char out_text[SENT], err_text[SENT], sent[SENT];
static unsigned char tls_record[PIECE_MAX], outgoing[PIECE_MAX];

/* A property does not hold. */
static int
broke(const char *what)
{
	fprintf(stderr, "property broken: %s\n", what);
	fprintf(stderr, "standard error was: %.*s\n", (int)w.nerr,
	    (char *)err_text);
	abort();
}

/* ---------------------------------------------------------- the kernel -- */

/* These need acme.c. */
static void on_signal(int);
static void check_created(const char *);
static ssize_t read_lookup(void *, size_t);

/* Time goes on; SIGALRM comes at its moment. */
static void
pass(long long ms)
{
	w.ms += ms;
	if (w.alarm_at && w.ms >= w.alarm_at) {
		w.alarm_at = 0;
		on_signal(SIGALRM);
	}
}

static int
new_fd(enum kind kind)
{
	int i = 3;

	while (w.fd[i].kind != FREE)
		if (++i == FDS)
			broke("too many descriptors are open");
	memset(&w.fd[i], 0, sizeof w.fd[i]);
	w.fd[i].kind = kind;
	w.fd[i].mode = S_IFREG | 0600;
	return i;
}

static enum kind
kind_of(int fd)
{
	return fd >= 0 && fd < FDS ? w.fd[fd].kind : FREE;
}

static int
absent(void)
{
	errno = ENOENT;
	return -1;
}

static int
find_file(const char *name)
{
	if (strncmp(name, "./", 2) == 0)
		name += 2;
	for (size_t i = 0; i < nfile; i++)
		if (strcmp(file[i].name, name) == 0)
			return (int)i;
	return absent();
}

static int
open_name(const char *name, int flags, ...)
{
	int i, fd;

	if (flags & O_DIRECTORY)
		return new_fd(OTHER_FD);
	if (flags & O_WRONLY) {
		check_created(name);
		return new_fd(OUTPUT);
	}
	if ((i = find_file(name)) < 0)
		return -1;
	fd = new_fd(CONTENT);
	w.fd[fd].p = file[i].p;
	w.fd[fd].n = file[i].n;
	return fd;
}

static int
close_fd(int fd)
{
	if (fd >= 0 && fd < FDS)
		w.fd[fd].kind = FREE;
	return 0;
}

static unsigned
next_cut(void)
{
	return w.cut = w.cut * 1103515245 + 12345 | 1;
}

/* How many bytes the next piece has: from 1, mostly up to 64. */
static size_t
piece_size(size_t n)
{
	size_t want = n;

	if (w.cut)
		want = next_cut() >> 8 & 0x300 ? 1 + (w.cut >> 16) % 64 :
		    4096;
	return want < n ? want : n;
}

/* The sign that comes next, or 0. */
static int
next_sign(void)
{
	return !w.gap && w.nnet - w.at > 1 && w.net[w.at] == 0 ?
	    w.net[w.at + 1] : 0;
}

/*
 * What the peers send. NUL and a letter are a sign: c, e and r end the
 * connection, with a close_notify of TLS, the end of TCP, or a reset; n is
 * between responses: no CA sends one before it is asked.
 */
static ssize_t
peer_bytes(unsigned char *to, size_t n)
{
	const unsigned char *start, *nul;
	size_t left;
	int sign;

	if (w.gap && w.cut >> 12 & 1) {
		next_cut();
		errno = EAGAIN;
		return -1;
	}
	if (n == 0 || w.at == w.nnet)
		return 0;
	while ((sign = next_sign()) == 'n')
		w.at += 2;
	if (sign == 'c' || sign == 'e' || sign == 'r') {
		w.at += 2;
		errno = ECONNRESET;
		w.closed = sign == 'c' && to == tls_record;
		return sign == 'r' ? -1 : w.closed;
	}
	start = w.net + w.at;
	left = w.nnet - w.at;
	nul = w.gap || !left ? NULL : memchr(start + 1, 0, left - 1);
	if (nul)
		left = (size_t)(nul - start);
	n = piece_size(n < left ? n : left);
	memcpy(to, start, n);
	w.at += n;
	return (ssize_t)n;
}

static ssize_t
read_fd(int fd, void *to, size_t n)
{
	size_t left;

	pass(1);
	switch (kind_of(fd)) {
	case FREE:
		broke("read from a descriptor that is not open");
	case CONTENT:
		left = w.fd[fd].n - w.fd[fd].at;
		n = n < left ? n : left;
		if (n)
			memcpy(to, w.fd[fd].p + w.fd[fd].at, n);
		w.fd[fd].at += n;
		return (ssize_t)n;
	case NETWORK:
		return peer_bytes(to, n);
	case LOOKUP:
		return read_lookup(to, n);
	default:
		return 0;
	}
}

static ssize_t
append(unsigned char *all, size_t *have, const void *p, size_t n)
{
	if (n > SENT - *have)
		broke("more than a MiB is written");
	if (n)
		memcpy(all + *have, p, n);
	*have += n;
	return (ssize_t)n;
}

static ssize_t
write_fd(int fd, const void *p, size_t n)
{
	if (kind_of(fd) == FREE)
		broke("write to a descriptor that is not open");
	if (fd == 1)
		return append(out_text, &w.nout, p, n);
	if (fd == 2)
		return append(err_text, &w.nerr, p, n);
	if (kind_of(fd) == NETWORK)
		return append(sent, &w.nsent, p, n);
	return (ssize_t)n;
}

static int
stat_fd(int fd, struct stat *st)
{
	*st = (struct stat){ .st_mode = fd == 1 && w.piped ? S_IFIFO | 0600 :
	    w.fd[fd].mode, .st_size = (off_t)w.fd[fd].n, .st_ino = 1 };
	return 0;
}

static int
stat_name(const char *name, struct stat *st)
{
	int i = find_file(name);

	if (i < 0)
		return -1;
	*st = (struct stat){ .st_mode = S_IFREG | 0600, .st_ino = 2,
	    .st_size = (off_t)file[i].n };
	return 0;
}

/* Can a descriptor be used at once? An idle connection has nothing. */
static bool
is_ready(const struct pollfd *p, int ms)
{
	enum kind kind = kind_of(p->fd);

	if (p->events & POLLOUT)
		return true;
	if (kind == NETWORK && ms == 0 && !w.gap)
		return next_sign() == 'e';
	return p->fd != 0 && kind != FREE;
}

static int
poll_fds(struct pollfd *p, nfds_t n, int ms)
{
	int found = 0;

	pass(1);
	for (nfds_t i = 0; i < n; i++) {
		p[i].revents = p[i].fd >= 0 && is_ready(&p[i], ms) ?
		    p[i].events : 0;
		found += p[i].revents != 0;
	}
	if (!found && ms)
		pass(ms > 0 ? ms : 1LL << 40);
	return found;
}

static int
get_random(unsigned char *to, size_t n)
{
	for (; n > 0; n--) {
		w.random = w.random * 1103515245 + 12345;
		*to++ = (unsigned char)(w.random >> 16);
	}
	return 0;
}

static pid_t
wait_child(pid_t pid, int *status)
{
	if (status)
		*status = 0;
	return pid;
}

static int
make_pair(int *fds, enum kind kind)
{
	fds[0] = new_fd(kind);
	fds[1] = new_fd(OTHER_FD);
	return 0;
}

/* A connection that is noted, with its address as the name. */
static int
connect_to(int fd, const struct sockaddr *to, socklen_t n)
{
	if (kind_of(fd) != NETWORK)
		broke("connect on a descriptor that is no socket");
	if (w.nconnection == CONNECTIONS)
		broke("too many connections");
	w.connection[w.nconnection].from = w.nsent;
	w.connection[w.nconnection].port =
	    ntohs(((const struct sockaddr_in *)to)->sin_port);
	return getnameinfo(to, n, w.connection[w.nconnection++].host, 64,
	    NULL, 0, NI_NUMERICHOST);
}

static char *
get_environment(const char *name)
{
	size_t n = strlen(name);

	if (strcmp(name, "ACME_DIRECTORY") == 0)
		return HOME "dir";
	return w.environment && strncmp(w.environment, name, n) == 0 &&
	    w.environment[n] == '=' ? (char *)w.environment + n + 1 : NULL;
}

/* A datagram: two bytes have its length, and it gets the question's number. */
static ssize_t
receive_datagram(unsigned char *to, size_t n)
{
	size_t left = w.nnet - w.at, length;

	pass(left < 2 ? 1000 : 1);
	if (left < 2)
		return 0;
	length = w.net[w.at] * 256U + w.net[w.at + 1];
	length = length < left - 2 ? length : left - 2;
	w.at += 2 + length;
	length = length < n ? length : n;
	memcpy(to, w.net + w.at - length, length);
	if (length > 1 && w.nsent > 1)
		memcpy(to, sent, 2);
	return (ssize_t)length;
}

int
resolve(const char *name, int class, int type, unsigned char *to, int n)
{
	return (int)receive_datagram(to, (size_t)n);
}

static int
resolve_name(const char *name, struct addrinfo **list)
{
	static struct sockaddr_in to = { .sin_family = AF_INET,
	    .sin_addr = { 0x0200007f } };
	static struct addrinfo one = { .ai_family = AF_INET,
	    .ai_addrlen = sizeof to, .ai_addr = (struct sockaddr *)&to };

	*list = &one;
	return *name == 'x' ? EAI_NONAME : 0;
}

#define open(...) open_name(__VA_ARGS__)
#define openat(dir, ...) open_name(__VA_ARGS__)
#define close(fd) close_fd(fd)
#define read read_fd
#define write write_fd
#define fstat(fd, st) stat_fd(fd, st)
#define stat(name, st) stat_name(name, st)
#define lstat(name, st) stat_name(name, st)
#define fstatat(...) absent()
#define access(name, mode) (find_file(name) < 0 ? -1 : 0)
#define poll(p, n, ms) poll_fds(p, n, ms)
#define unlinkat(dir, name, flags) (check_created(name), 0)
#define linkat(a, old, b, new, flags) \
	(check_created(new), *(old) ? 0 : absent())
#define renameat(a, old, b, new) linkat(a, old, b, new, 0)
#define fchmod(f, to) (w.fd[f].mode = S_IFREG | (to), 0)
#define fchown(...) 0
#define ftruncate(...) 0
#define fsync(...) 0
#define lseek(fd, at, whence) (at)
#define dup(old) new_fd(w.fd[old].kind)
#define dup2(fd, to) (to)
#define mkdir(...) 0
#define readlink(...) absent()
#define opendir(...) NULL
#define statvfs(name, st) (memset(st, 0, sizeof *(st)), 0)
#define isatty(...) 0
#define getentropy(p, n) get_random(p, n)
#define clock_gettime(id, t) ((t)->tv_sec = w.ms / 1000, \
	(t)->tv_nsec = w.ms % 1000 * 1000000, 0)
#define time(...) (RELEASED + 10 * 86400 + w.ms / 1000)
#define alarm(s) (w.alarm_at = (s) ? w.ms + (s) * 1000LL : 0)
#define sigaction(...) -1
#define sigprocmask(...) 0
#define signal(...) 0
#define fork() PID
#define kill(pid, sig) \
	(abs(pid) == PID ? 0 : broke("a signal goes to another process"))
#define waitpid(pid, status, flags) wait_child(pid, status)
#define waitid(type, pid, info, flags) ((info)->si_pid = (pid), 0)
#define pipe(fds) make_pair(fds, LOOKUP)
#define socketpair(family, type, protocol, fds) make_pair(fds, NETWORK)
#define socket(...) new_fd(NETWORK)
#define connect(fd, to, n) connect_to(fd, to, n)
#define getsockopt(fd, level, name, value, n) (memset(value, 0, *(n)), 0)
#define setsockopt(...) 0
#define fcntl(...) 0
#define shutdown(...) 0
#define getenv(name) get_environment(name)
#define _exit(code) (w.status = (code), siglongjmp(w.end, 1))
#define recv(fd, p, n, flags) receive_datagram(p, n)
#define send(fd, p, n, flags) (w.nsent = 0, append(sent, &w.nsent, p, n))
#define res_query resolve
#define getaddrinfo(name, port, hint, list) resolve_name(name, list)
#define setpgid(...) 0
#define execv(...) broke("the step itself runs a program")

/* ------------------------------------------------- TLS that is not one -- */

static int
begin_tls(const char *name)
{
	if (w.nconnection && name)
		snprintf(w.connection[w.nconnection - 1].host,
		    sizeof w.connection[0].host, "%s", name);
	w.have = w.taken = 0;
	w.closed = false;
	return 1;
}

static void
take(size_t n)
{
	if (n > w.have - w.taken)
		broke("more was taken than had come");
	w.taken += n;
}

#define br_ssl_client_reset(c, name, resume) (w.real_tls ? \
	br_ssl_client_reset(c, name, resume) : begin_tls(name))
#define br_ssl_engine_current_state(e) (w.real_tls ? \
	br_ssl_engine_current_state(e) : \
	w.have > w.taken ? BR_SSL_SENDAPP | BR_SSL_RECVAPP : \
	w.closed ? BR_SSL_CLOSED : BR_SSL_SENDAPP | BR_SSL_RECVREC)
#define br_ssl_engine_last_error(e) (w.real_tls ? \
	br_ssl_engine_last_error(e) : BR_ERR_OK)
#define br_ssl_engine_sendapp_buf(e, n) (w.real_tls ? \
	br_ssl_engine_sendapp_buf(e, n) : (*(n) = PIECE_MAX, outgoing))
#define br_ssl_engine_sendapp_ack(e, n) (w.real_tls ? \
	br_ssl_engine_sendapp_ack(e, n) : \
	(void)append(sent, &w.nsent, outgoing, n))
#define br_ssl_engine_recvapp_buf(e, n) (w.real_tls ? \
	br_ssl_engine_recvapp_buf(e, n) : \
	(*(n) = w.have - w.taken, tls_record + w.taken))
#define br_ssl_engine_recvapp_ack(e, n) (w.real_tls ? \
	br_ssl_engine_recvapp_ack(e, n) : take(n))
#define br_ssl_engine_recvrec_buf(e, n) (w.real_tls ? \
	br_ssl_engine_recvrec_buf(e, n) : (*(n) = PIECE_MAX, tls_record))
#define br_ssl_engine_recvrec_ack(e, n) (w.real_tls ? \
	br_ssl_engine_recvrec_ack(e, n) : \
	(void)(w.have = w.closed ? 0 : (n), w.taken = 0))
#define br_ssl_engine_sendrec_buf(e, n) (w.real_tls ? \
	br_ssl_engine_sendrec_buf(e, n) : NULL)
#define br_ssl_engine_flush(e, force) (w.real_tls ? \
	br_ssl_engine_flush(e, force) : (void)0)
#define br_ssl_engine_close(e) (w.real_tls ? \
	br_ssl_engine_close(e) : (void)0)

#define main acme_main
#pragma clang section bss = "acme_bss" data = "acme_data"
#include "acme.c"
#pragma clang section bss = "" data = ""
#undef main

/* Of a process that looks up a name: one address. */
static ssize_t
read_lookup(void *to, size_t n)
{
	struct lookup l = { .n = 1 };

	if (n != sizeof l)
		return 0;
	l.list[0] = address_of((Str){ (const unsigned char *)"\x7f\0\0\2",
	    4 });
	memcpy(to, &l, n);
	return (ssize_t)n;
}

/*
 * What is created is a temporary file, the output that the command line
 * names, a token in DIR, or the N.request and N.response of a box.
 */
static void
check_created(const char *name)
{
	Str s = str(name), rest = s, kind = s;
	Str stem = cut(&kind, '.');

	if (begins(s, ".acme-step."))
		rest = from(s, 11);
	if ((rest.n == 16 && rest.p != s.p && made_of(rest, HEX)) ||
	    (opt['o'] && contains(str(opt['o']), s)) ||
	    (made_of(s, ALPHA DIGIT "-_") && s.n <= TOKEN) ||
	    (made_of(stem, DIGIT) && (is(kind, "request") ||
	    is(kind, "response"))))
		return;
	broke("a file is created under a name of the CA's choice");
}

/* ----------------------------------------------------------- a new run -- */

extern unsigned char __start_acme_bss[], __stop_acme_bss[],
    __start_acme_data[], __stop_acme_data[];
static unsigned char data_at_first[1 << 16];

/* The state of acme.c has gaps between its objects, which ASan forbids. */
#define UNCHECKED __attribute__((no_sanitize("address", "undefined"), \
    no_builtin))

static void UNCHECKED
copy(unsigned char *to, const unsigned char *from, size_t n)
{
	while (n-- > 0)
		*to++ = *from++;
}

/* From one multiple of eight to another. */
static void UNCHECKED
clear(unsigned char *start, unsigned char *end)
{
	for (volatile uint64_t *p = (void *)start; p < (uint64_t *)end; p++)
		*p = 0;
}

/* Forget all that acme.c knows; the kernel drops the pages it has used. */
static void
forget(void)
{
	unsigned char *start = (unsigned char *)(((uintptr_t)
	    __start_acme_bss + PAGE - 1) / PAGE * PAGE);
	unsigned char *end = (unsigned char *)((uintptr_t)__stop_acme_bss /
	    PAGE * PAGE);

	clear(__start_acme_bss, start);
	clear(end, __stop_acme_bss);
	if (madvise(start, (size_t)(end - start), MADV_DONTNEED) != 0)
		abort();
	copy(__start_acme_data, data_at_first,
	    (size_t)(__stop_acme_data - __start_acme_data));
	conn.fd = -1;
}

/* A new run: peers send `net`, and standard input is `in`. */
static void
begin_run(Str in, Str net, unsigned cut)
{
	forget();
	memset(&w, 0, offsetof(__typeof__(w), connection));
	w.ms = 1000000;
	w.random = 1;
	w.cut = cut;
	w.fd[0].kind = CONTENT;
	w.fd[0].p = in.p;
	w.fd[0].n = in.n;
	w.fd[0].mode = S_IFREG | 0600;
	w.fd[1].kind = w.fd[2].kind = OUTPUT;
	w.net = net.p;
	w.nnet = net.n;
}

/* NONE if there is no such file. */
static Str
file_text(const char *name)
{
	int i = find_file(name);

	return i < 0 ? NONE : (Str){ file[i].p, file[i].n };
}

static Str
out_str(void)
{
	return (Str){ out_text, w.nout };
}

static Str
err_str(void)
{
	return (Str){ err_text, w.nerr };
}

/* A character of UTF-8 (RFC 3629 3), not by acme.c; -1 if malformed. */
static long
character(Str *s)
{
	static const long least[] = { 0, 0, 0x80, 0x800, 0x10000 };
	unsigned c = s->p[0];
	size_t n = c < 0x80 ? 1 : c < 0xc0 ? 9 : c < 0xe0 ? 2 : c < 0xf0 ? 3 :
	    c < 0xf8 ? 4 : 9;
	long u = n == 1 ? (long)c : (long)(c & (0xff >> (n + 1)));

	if (n == 9 || n > s->n)
		return -1;
	for (size_t i = 1; i < n; i++) {
		if (s->p[i] >> 6 != 2)
			return -1;
		u = u << 6 | (s->p[i] & 0x3f);
	}
	*s = (Str){ s->p + n, s->n - n };
	return u < least[n] || (u >= 0xd800 && u < 0xe000) || u > 0x10ffff ?
	    -1 : u;
}

static bool
is_utf8(Str s)
{
	while (s.n)
		if (character(&s) < 0)
			return false;
	return true;
}

/* Does a character move a terminal's cursor, or turn its text round? */
static bool
is_harmful(long u)
{
	return u < 0x20 || (u >= 0x7f && u < 0xa0) || u == 0x61c ||
	    u == 0x200e || u == 0x200f || (u >= 0x2028 && u <= 0x202e) ||
	    (u >= 0x2066 && u <= 0x2069);
}

/* Lines without such characters, the last one whole. */
static void
check_lines(Str s, const char *what)
{
	if (s.n && s.p[s.n - 1] != '\n')
		broke("the last line is not whole");
	while (s.n) {
		long u = character(&s);

		if (u != '\n' && is_harmful(u))
			broke(what);
	}
}

/* Of messages, each begins with the program's name. */
static void
check_messages(void)
{
	Str s = err_str();

	check_lines(s, "a control character is in a message");
	while (s.n) {
		Str l = cut(&s, '\n');

		if (!begins(l, "acme-step: ") && !begins(l, "usage: ") &&
		    !begins(l, "commands for a certificate: "))
			broke("a message does not begin with acme-step:");
		if (l.n > MESSAGE)
			broke("a message is longer than its limit");
	}
}

/* One of the exit statuses of README; a failure has a message. */
static void
check_status(int status)
{
	static const unsigned char all[] = { 0, 1, 64, 65, 66, 69, 70, 73,
	    74, 75, 76, 77, 78 };

	if (!memchr(all, status, sizeof all))
		broke("the exit status is not one of README's");
	if (status > 1 && w.nerr == 0)
		broke("the step fails without a message");
}

/* The status that these statements end the step with, or -1. */
#define ends(...) ({ \
	w.status = -1; \
	if (sigsetjmp(w.end, 0) == 0) { \
		__VA_ARGS__; \
	} else \
		check_status(w.status); \
	check_messages(); \
	w.status; \
})

/* Copies that outlive a run. */
static unsigned char kept[2][SENT];
static Str
keep_copy(int i, Str s)
{
	if (s.n > SENT)
		abort();
	if (s.n)
		memcpy(kept[i], s.p, s.n);
	return (Str){ kept[i], s.n };
}

/* The input of a target, which its function reads. */
static Str input;

static unsigned
take_byte(void)
{
	unsigned c = input.n ? input.p[0] : 0;

	input = from(input, 1);
	return c;
}

/* ------------------------------------------------------------- JSON -- */

static char *words[64];
static int nwords;

/* The element of an array that json prints on a line of its own. */
static void
check_element(Str *text, Str v)
{
	Str want = plain(v), got = { text->p, want.n }, again;

	if (text->n <= want.n || !same(got, want) || text->p[want.n] != '\n')
		broke("json prints another element than the array has");
	if (json_kind(v) != '"' && (!json_read(got, &again) ||
	    !same(again, got)))
		broke("json prints an element that is not JSON");
	*text = from(*text, want.n + 1);
}

static void
check_value(Str v)
{
	Str s = out_str(), text = { s.p, s.n ? s.n - 1 : 0 }, none, again;

	if (json_kind(v) != '[' && (s.n == 0 || s.p[s.n - 1] != '\n'))
		broke("json prints no whole line");
	if (json_kind(v) == '"') {
		if (!json_read(quote(text), &again) ||
		    !same(json_text(again), text) ||
		    !same(json_text(v), text))
			broke("a string of json does not parse to the same");
	} else if (json_kind(v) == '[') {
		for (text = s; json_each(&v, &none, &again); )
			check_element(&text, again);
		if (text.n)
			broke("json prints more than the array has");
	} else if (!json_read(text, &again) || !same(again, text) ||
	    !same(text, v))
		broke("what json prints does not parse to the same");
}

/* A path, a newline, and JSON: what json prints parses to the same. */
static void
fuzz_json(void)
{
	static char path[256];
	Str all = input, p = cut(&all, '\n'), v, rest;
	int status;

	if (p.n >= sizeof path || (p.n && memchr(p.p, 0, p.n)) ||
	    begins(p, "-"))
		return;
	snprintf(path, sizeof path, "%.*s", (int)p.n, (const char *)p.p);
	words[1] = "json";
	words[2] = path;
	nwords = 3;
	begin_run(all, NONE, 0);
	status = ends(run(nwords, words); leave(DONE));
	forget();
	if (begins(all, BYTE_ORDER_MARK))
		all = from(all, 3);
	if (!json_read(all, &v)) {
		if (status != BAD)
			broke("json accepts what is not JSON");
		return;
	}
	for (rest = p; !is(p, ".") && v.n; ) {
		v = json_step(v, cut(&rest, '.'));
		if (!rest.n)
			break;
	}
	if (status != (v.n ? DONE : NO))
		broke("the exit status of json");
	if (v.n)
		check_value(v);
}

/* Any UTF-8 in quote() reads as the same, and braces make an object. */
static void
fuzz_quote(void)
{
	Str v, o;

	if (!is_utf8(input))
		return;
	if (!json_read(quote(input), &v) || !same(json_text(v), input))
		broke("quote() does not parse to the same");
	o = braces(with(with(NONE, "a", quote(input)), "b", S("1")));
	if (!json_read(o, &v) || !same(text_of(v, "a"), input) ||
	    !is(json_member(v, "b"), "1"))
		broke("an object does not parse to the same");
}

/* ------------------------------------------------------------- HTTP -- */

static struct conversation {
	unsigned methods;
	Str seen;
} talk;

static void
note(Str s)
{
	talk.seen = cat(NONE, talk.seen, num(s.n), S(" "), s, S("\n"));
}

static void
note_links(const struct response *r)
{
	static const char *const relation[] = { "alternate", "next" };

	for (size_t i = 0; i < COUNT(relation); i++) {
		struct links l = begin_links(r);
		Str url;

		while ((url = next_link(&l, str(relation[i]))).n) {
			if (!is_url(url))
				broke("a link is not an https URL");
			note(url);
		}
	}
}

/* The responses to four requests of one write. */
static void
converse(void)
{
	static const char *const method[] = { "GET", "HEAD", "POST", "POST" };
	struct response r;

	conn.fd = tls.fd = new_fd(NETWORK);
	for (int i = 0; i < 4; i++) {
		struct request q = { .method = method[talk.methods >> 2 * i &
		    3], .url = S("https://ca.test/a/b?c") };

		if (!http_receive(&q, &r))
			break;
		note(num((unsigned)r.status));
		note(r.location);
		note(r.nonce);
		note(r.body);
		note(num((unsigned long)(r.retry_after + 1)));
		note_links(&r);
		if (r.last)
			break;
	}
}

static int
hear(Str net, unsigned cut)
{
	begin_run(NONE, net, cut);
	talk.seen = NONE;
	return ends(converse());
}

/* Cut anywhere, a batch's responses are read as they are in one piece. */
static void
fuzz_http(void)
{
	unsigned cut;
	int status, again;
	Str one;

	talk.methods = take_byte();
	cut = take_byte() << 8 | 1;
	status = hear(input, 0);
	one = keep_copy(0, status < 0 ? talk.seen : err_str());
	again = hear(input, cut);
	if (again != status || !same(one, status < 0 ? talk.seen : err_str()))
		broke("responses depend on how they are cut");
}

/* A header: the links in it. */
static void
fuzz_link(void)
{
	struct response r = { .url = S("https://ca.test/a"),
	    .head = cat(NONE, S("Link: "), input) };

	talk.seen = NONE;
	ends(note_links(&r));
}

/* ----------------------------------------------------------- records -- */

static int
reading(Str s, bool of_account)
{
	return ends(record_read(s, "record", of_account));
}

/* A record that was read prints to what reads the same. */
static void
fuzz_record(void)
{
	bool of_account = take_byte() & 1;
	Str first;

	if (reading(input, of_account) >= 0)
		return;
	first = keep_copy(0, cat(NONE, record_text(), S("end\n")));
	check_lines(first, "a control character is in a record");
	begin_run(NONE, NONE, 0);
	if (reading(first, of_account) >= 0)
		broke("a record that was printed is not read");
	if (!same(first, cat(NONE, record_text(), S("end\n"))))
		broke("a record that was printed reads as another");
}

/* ------------------------------------------- certificates and keys -- */

static void
look_into(const struct cert *c)
{
	struct constraints k;
	struct identifier name;
	br_x509_pkey key;
	Str list = c->alt_names;

	while (cert_name(&list, &name))
		is_name(name.type, name.value);
	has_twice(c);
	is_for_servers(c);
	common_name(c->issuer);
	certificate_id(c);
	key_in(c->public_key, &key);
	if (read_constraints(c, &k))
		forbidden_name(&k, c);
	renewal_time(c);
	date(c->not_after);
	date(c->not_before);
}

/* A certificate, PEM or DER: openssl sees the same date in it. */
static void
fuzz_cert(void)
{
	struct cert c, again;
	long long end;

	if (!find_certificate(input, &c))
		return;
	look_into(&c);
	if (openssl_certificate(c.der.p, c.der.n, &end) && end >= 0 &&
	    end != c.not_after)
		broke("openssl reads another date");
	if (!find_certificate(pem(c.der, "CERTIFICATE"), &again) ||
	    !same(c.der, again.der))
		broke("PEM that was written reads as another certificate");
}

/* due, of any file. */
static void
fuzz_due(void)
{
	ends(do_due((char *[]){ "input", "a.test", NULL }));
	check_lines(out_str(), "a control character is in the answer of due");
}

/* A private key: openssl reads what we write, and sees the same key. */
static void
fuzz_key(void)
{
	unsigned char spki[1024];
	Str text, label, block, public;
	bool bad;

	if (ends(key_read(&other_key, "input")) >= 0)
		return;
	text = key_pem(&other_key);
	public = public_key(&other_key);
	if (!pem_next(&text, &label, &block, &bad) || !same(public,
	    (Str){ spki, openssl_key(block.p, block.n, spki, sizeof spki) }))
		broke("openssl reads a key of ours as another");
}

static char names_text[1 << 16];

/* The names of the order, as the oracle has those of a request. */
static Str
names_wanted(void)
{
	const struct identifier *id;
	Str all = NONE;

	for each(id, identifier)
		all = cat(NONE, all, id->type, S(" "), is_ip(id->type) ?
		    hex(ip_bytes(id->value)) : id->value, S("\n"));
	return all;
}

static struct key saved_key, saved_other;

static void
load_keys(void)
{
	have_account_key = true;
	account_key = saved_key;
}

/* The lines of the input become words[]; returns memory for free(). */
static char *
split_input(void)
{
	char *text = strndup((const char *)input.p, input.n), *at = text;

	for (nwords = 0; at && nwords < 60; )
		words[nwords++] = strsep(&at, "\n");
	words[nwords] = NULL;
	return text;
}

/* Lines, a common name and names: openssl reads the request and them. */
static void
fuzz_request(void)
{
	char *text = split_input();
	struct challenge c = { .content = NONE };
	Str made, want;
	long long end;

	other_key = saved_other;
	opt['N'] = words[0];
	if (nwords > 1 && ends(check_csr(words + 1), take_names(words + 1),
	    made = csr_der(&other_key, record_names(), str(words[0]))) < 0) {
		if (!is_utf8(str(words[0])))
			broke("a common name is not UTF-8");
		want = names_wanted();
		if (!openssl_request(made.p, made.n, names_text,
		    sizeof names_text) || !is(want, names_text))
			broke("openssl reads another request");
		c.id = order.identifier[0];
		c.content = hex(sha256(want));
		made = validation_certificate(&c);
		if (!openssl_certificate(made.p, made.n, &end))
			broke("openssl does not read our certificate");
	}
	free(text);
}

/* A request; csr_read() has it where nothing is beyond its end. */
static void
fuzz_csr(void)
{
	struct cert csr;
	bool genuine;

	csr_read(input, &csr, &genuine);
	load_keys();
	ends(read_csr("input", &csr), look_into(&csr), names_differ(&csr));
}

static struct response response;
static size_t ncerts;

static int
taking_chain(void)
{
	return ends(ncerts = read_chain(&response), names_differ(&issued[0]),
	    top_issuer(ncerts));
}

static Str
issued_pem(void)
{
	Str all = NONE;

	for (size_t i = 0; i < ncerts; i++)
		all = cat(NONE, all, pem(issued[i].der, "CERTIFICATE"));
	return all;
}

/* A chain: what is printed of it is the same chain, and no more. */
static void
fuzz_chain(void)
{
	size_t n;
	Str all;

	response = (struct response){ .url = S("https://ca.test/c"),
	    .body = input };
	if (taking_chain() >= 0)
		return;
	n = ncerts;
	for (size_t i = 0; i < n; i++)
		look_into(&issued[i]);
	all = keep_copy(0, issued_pem());
	check_lines(all, "a chain has other characters than PEM");
	response.body = all;
	begin_run(NONE, NONE, 0);
	if (taking_chain() >= 0 || ncerts != n || !same(issued_pem(), all))
		broke("a printed chain does not read the same");
}

static unsigned verdict;
static Str trusted, fault;

static void
validate(void)
{
	const br_x509_class *vtable = &chain_vtable, **v = &vtable;
	Str rest = input, label, block;
	bool bad;

	anchor_file = "ca.pem";
	chain_start(v, "localhost");
	while (pem_next(&rest, &label, &block, &bad)) {
		chain_start_cert(v, (uint32_t)block.n);
		for (size_t n = block.n / 2, i = 0; i < 2; i++, n = block.n -
		    n)
			chain_append(v, block.p + i * (block.n / 2), n);
		chain_end_cert(v);
	}
	verdict = chain_end(v);
	fault = verdict ? chain_fault((int)verdict) : NONE;
}

/*
 * The chain of a server: what is accepted has the key and the names of a
 * certificate that the CA has issued.
 */
static void
fuzz_validate(void)
{
	struct cert good;

	if (ends(validate()) >= 0 || verdict)
		return;
	if (!find_certificate(file_text("server.pem"), &good))
		abort();
	if (!same(good.public_key, chain.cert[0].public_key) ||
	    !same(good.alt_names, chain.cert[0].alt_names))
		broke("a chain that the CA did not issue is trusted");
}

/* --------------------------------------------------------------- DNS -- */

/* Two contents for one name, of which one is long, and a name below. */
#define RECORDS \
	"challenge dns-01 dns a.test https://ca.test/1 " \
	"_acme-challenge.a.test abc\n" \
	"challenge dns-01 dns *.a.test https://ca.test/2 " \
	"_acme-challenge.a.test def\n" \
	"challenge dns-persist-01 dns b.a.test https://ca.test/3 " \
	"_validation-persist.b.a.test " SIXTY SIXTY SIXTY SIXTY SIXTY \
	"; policy=x\n"
#define SIXTY "012345678901234567890123456789012345678901234567890123456789"
#define FILES_OF \
	"challenge http-01 dns a.test https://ca.test/1 " \
	"token-1234567890123456789 token-1234567890123456789.thumb\n"
#define ALPN_OF \
	"challenge tls-alpn-01 dns a.test https://ca.test/1 a.test " \
	"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\n"

/* A run of a step that has read a record; peers send the input. */
static void
begin_with(const char *lines, unsigned cut)
{
	begin_run(NONE, input, cut);
	if (reading(text("%end\n", str(lines)), false) >= 0)
		abort();
}

/* A question: the answer is well formed, and not too long. */
static void
fuzz_question(void)
{
	bool udp = take_byte() & 1;
	size_t limit = udp ? PLAIN : 65535, answers = 0;
	Str s;

	begin_with(RECORDS, 0);
	s = dns_answer(input, limit);
	if (!s.n)
		return;
	if (udp && (s.n > DATAGRAM || (s.n > 4 * input.n)))
		broke("a DNS answer is longer than its limit");
	if (s.n < 12 || s.p[0] != input.p[0] || s.p[1] != input.p[1] ||
	    !(s.p[2] & 0x80))
		broke("a DNS answer is not one to the question");
	if (!libresolv_message(s.p, s.n, &answers))
		broke("libresolv does not read a DNS answer");
	if (answers > 2)
		broke("a DNS answer has too many records");
}

/* An answer: its records are read to an end. */
static void
fuzz_answer(void)
{
	struct reader r;
	struct record one;
	struct query q;

	q = dns_query(S("_acme-challenge.a.test"), TXT, true);
	is_answer(input, &q);
	if (input.n < DNS_HEAD)
		return;
	for (r = dns_records(input); dns_next(&r, &one); )
		if (one.data.p + one.data.n > input.p + input.n)
			broke("a DNS record goes beyond its message");
}

/* respond -c: what servers say is in its report, and nothing else of them. */
static void
fuzz_look(void)
{
	static const char *const of[] = { FILES_OF, RECORDS, ALPN_OF };
	unsigned c = take_byte(), cut = take_byte() << 8 | 1;

	begin_with(of[c % COUNT(of)], cut);
	deadline = now_ms() + 30000;
	looking_for = order.challenge[0].id.value;
	ends(find_challenge_type(order.challenge[0].type)->look(
	    &order.challenge[0]));
	check_lines(out_str(), "a control character is in a report");
}

/* -------------------------------------------------------- responders -- */

static void
serve(void)
{
	struct client *c = &clients[0];

	c->fd = new_fd(NETWORK);
	c->begun = false;
	if (!proxied)
		client_begin(responder, c);
	for (int i = 0; i < 20000 && c->fd >= 0; i++) {
		size_t mark = used;

		client_serve(responder, c);
		used = mark;
	}
	if (c->fd >= 0)
		broke("a peer is served without end");
}

/* HTTP: 404, or the content of the challenge, and its length. */
static void
check_page(void)
{
	Str s = { sent, w.nsent }, l, content = order.challenge[0].content;
	unsigned long n = 0;
	bool found;

	if (!s.n)
		return;
	l = cut(&s, '\n');
	found = is(l, "HTTP/1.1 200 OK\r");
	if (!found && !is(l, "HTTP/1.1 404 Not Found\r"))
		broke("the responder sends something else");
	while (!is(l = cut(&s, '\n'), "\r"))
		if (is(cut(&l, ' '), "Content-Length:"))
			number(cut(&l, '\r'), 9999, &n);
	if (n != (found ? content.n : 0) || (s.n && !same(s, content)))
		broke("the responder sends other content");
	if (found && !contains(input, text(" " WELL_KNOWN "% HTTP/1.",
	    order.challenge[0].name)))
		broke("the responder sends the content for another path");
}

static void
fuzz_responder(void)
{
	static const struct responder *const how[] = { &http_responder,
	    &alpn_responder, &dns_responder };
	static const char *const of[] = { FILES_OF, ALPN_OF, RECORDS };
	unsigned c = take_byte(), cut = take_byte() << 8 | 1;

	begin_with(of[c % 3], cut);
	w.gap = w.real_tls = true;
	proxied = c / 3 & 1;
	responder = how[c % 3];
	if (c % 3 == 1) {
		other_key = saved_other;
		validation[0] = validation_certificate(&order.challenge[0]);
	}
	ends(serve());
	if (c % 3 == 0)
		check_page();
}

/* ------------------------------------------------------------- boxes -- */

static struct request one, two;

static Str
response_text(const struct response *r)
{
	Str head = r->head, value, all = NONE;

	while (next_field(&head, S("Link"), &value))
		if (value.n)
			all = cat(NONE, all, value, S("\n"));
	return text("%\n%\n%\n%\n%\n%", num((unsigned)r->status),
	    r->location, r->nonce, num((unsigned long)(r->retry_after + 1)),
	    all, r->body);
}

/* A response that send stores reads as the one that came. */
static void
store(void)
{
	Str s, before, request = S("x");
	bool came = false;

	begin_run(NONE, input, 0);
	conn.fd = tls.fd = new_fd(NETWORK);
	one = (struct request){ .method = "POST",
	    .url = S("https://ca.test/a") };
	if (ends(came = http_receive(&one, &response)) >= 0 || !came)
		return;
	before = keep_copy(0, response_text(&response));
	s = box_response(&response);
	s = keep_copy(1, text("%" BOX_CHECK "%\n", s, box_check(request,
	    s)));
	begin_run(NONE, NONE, 0);
	if (!box_open(request, &s))
		broke("a response that was stored has a wrong check");
	conn.from = s.p;
	conn.have = s.n;
	conn.whole = true;
	if (ends(came = http_receive(&one, &response)) >= 0 || !came ||
	    conn.at != conn.have || !same(before, response_text(&response)))
		broke("a response that was stored reads as another");
}

/* A file of a box that is a request writes as what reads the same. */
static void
fuzz_box(void)
{
	unsigned c = take_byte();
	Str s;

	if (c & 1) {
		store();
		return;
	}
	if (!read_request_file(input, &one))
		return;
	s = box_request(&one);
	if (!read_request_file(s, &two) || !same(one.url, two.url) ||
	    !same(one.body, two.body) || strcmp(one.method, two.method) != 0)
		broke("a request of a box reads as another");
}

/* --------------------------------------------------------------- EAB -- */

/* A KID and a key: the binding is JSON, and has that KID. */
static void
fuzz_eab(void)
{
	Str o, v, made;

	opt['e'] = "input";
	directory_body = S("{\"newAccount\":\"https://ca.test/a\"}");
	order.directory = directory_response.url = directory_url =
	    S("https://ca.test/d");
	load_keys();
	if (ends(check_new_account(NULL), made = account_binding()) >= 0 ||
	    !is_utf8(binding.kid))
		return;
	if (!json_read(made, &v) ||
	    !json_read(unb64(text_of(v, "protected")), &o) ||
	    !same(text_of(o, "kid"), binding.kid))
		broke("an account binding does not have the KID");
}

/* ------------------------------------------------------ times, URLs -- */

static void
fuzz_time(void)
{
	long long t, again;
	unsigned c = take_byte();
	long n = c % 4 == 3 ? retry_after(input) : 0;
	bool ok = c % 4 == 0 ? rfc3339(input, &t) : c % 4 == 1 ?
	    http_date(input, &t) : c % 4 == 2 && x509_time(c & 4 ? UTC_TIME :
	    TIME, input, &t);

	/* Of the years that have four digits. */
	if (ok && t >= -62167219200LL && t < 253402300800LL &&
	    (!rfc3339(date(t), &again) || t != again))
		broke("a time that was written reads as another");
	if (n < -1 || n > MAX_WAIT)
		broke("Retry-After is out of its range");
}

/* A URL and a reference: a request has the lines that it should. */
static void
fuzz_url(void)
{
	Str rest = input, base = cut(&rest, '\n'), ref = cut(&rest, '\n'), s;
	struct request q = { .method = "GET" };
	struct proxy proxy;
	struct url u;
	int lines = 0;

	q.url = absolute(base, ref);
	is_entry(ref, S("www.example.com"), S("443"));
	is_entry(ref, S("10.1.2.3"), S("443"));
	if (url_read(q.url, &u)) {
		if (!same_origin(q.url, q.url) ||
		    !same_origin(q.url, u.origin))
			broke("a URL has not its own origin");
		if (u.host.n > HOSTNAME || u.port.n > PORT || !u.port.n)
			broke("a host or port is too long");
		s = http_text(&q, &u, url_target(&u));
		while (s.n) {
			Str l = cut(&s, '\n');

			lines++;
			if (!l.n || l.p[l.n - 1] != '\r' || memchr(l.p, '\r',
			    l.n - 1))
				broke("a request has other lines");
		}
		if (lines != 4)
			broke("a request has more lines");
		fill_command(c_str(u.host), c_str(u.port));
	}
	if (rest.n && ends(read_proxy(rest, &proxy)) < 0 &&
	    proxy.host.n > HOSTNAME)
		broke("a proxy's host is too long");
}

#define PASSWORD "s3cr3t%40word"

/* A proxy: no byte that follows its header is read, no secret shown. */
static void
fuzz_proxy(void)
{
	unsigned c = take_byte();
	int status;

	begin_run(NONE, input, c << 8 | 1);
	deadline = now_ms() + 30000;
	status = ends(dial_proxy(c & 0x80 ? S("http://proxy.test:3128") :
	    S("http://user:" PASSWORD "@proxy.test:3128"), "ca.test", "443"));
	if (!(c & 0x80) && (contains(err_str(), S("s3cr3t")) ||
	    contains(err_str(), base64(S("user:s3cr3t@word")))))
		broke("a message has the password of the proxy");
	if (input.n && memchr(input.p, 0, input.n))
		return;			/* a sign */
	if (status < 0 && (w.at < 2 || w.net[w.at - 1] != '\n' ||
	    !(w.net[w.at - 2] == '\n' || (w.at > 2 && w.net[w.at - 2] ==
	    '\r' && w.net[w.at - 3] == '\n'))))
		broke("more than the proxy's header is read");
}

/* ------------------------------------------------------- whole steps -- */

/* Of the file "commands": NAME of standard input, and the words. */
enum { ROWS = 64, WORDS = 24 };
static struct {
	const char *in, *environment;
	char *word[WORDS];
	int n;
} row[ROWS];
static size_t nrow;
static bool show;		/* FUZZ_SHOW is set: print what a run does */

static void
read_rows(char *text)
{
	char *l, *one;

	while ((l = strsep(&text, "\n")) && nrow < ROWS) {
		if (!*l)
			continue;
		row[nrow].in = strsep(&l, " ");
		row[nrow].word[row[nrow].n++] = "acme-step";
		while ((one = strsep(&l, " ")) && row[nrow].n < WORDS - 1)
			if (row[nrow].n == 1 && strchr(one, '='))
				row[nrow].environment = one;
			else
				row[nrow].word[row[nrow].n++] = one;
		nrow++;
	}
}

/* An origin: the host and port of a URL, whatever their spelling. */
struct origin {
	char host[300];
	unsigned long port;	/* 0: there is none */
};

/* Not by acme.c. */
static struct origin
origin_of(Str url)
{
	struct origin o = { "", 443 };
	unsigned char ip[16];
	char *port, *c;
	size_t n = 8;

	if (url.n < 9 || strncasecmp((const char *)url.p, "https://", 8) != 0)
		broke("a URL is not https");
	while (n < url.n && !strchr("/?#", url.p[n]) && n < 300) {
		o.host[n - 8] = lower_case(url.p[n]);
		n++;
	}
	port = strrchr(o.host, ':');
	if (port && !strchr(port, ']')) {
		o.port = strtoul(port + 1, NULL, 10);
		*port = 0;
	}
	if (o.host[0] == '[' && (c = strchr(o.host, ']'))) {
		*c = 0;
		if (inet_pton(AF_INET6, o.host + 1, ip) == 1)
			inet_ntop(AF_INET6, ip, o.host, sizeof o.host);
	}
	return o;
}

static bool
is_origin(const struct origin *a, const struct origin *b)
{
	return a->port == b->port && strcmp(a->host, b->host) == 0;
}

/* What a step may request from where. */
static struct {
	struct origin elsewhere;	/* where the directory redirects to */
	struct origin signed_for;	/* the one of all signed requests */
	bool renewal;		/* renewalInfo may be anywhere */
	int posts;
} policy;

static void
check_origin(Str method, Str url)
{
	struct origin o = origin_of(url), ca = origin_of(S(HOME));
	bool home = is_origin(&o, &ca);
	bool other = is_origin(&o, &policy.elsewhere);

	if (is(method, "POST")) {
		if (!home && !other)
			broke("a signed request goes to another origin");
		if (policy.posts++ && !is_origin(&o, &policy.signed_for))
			broke("signed requests go to two origins");
		policy.signed_for = o;
	} else if (!home && !other) {
		if (is(method, "HEAD") || ((policy.posts ||
		    policy.elsewhere.port) && !policy.renewal))
			broke("a request goes to another origin");
		policy.elsewhere = o;
	}
}

/* The URL in what was signed is that of the request (RFC 8555 6.4). */
static void
check_signed(Str body, Str url)
{
	struct url u, v;
	Str o, p;

	if (!json_read(body, &o) || !json_read(unb64(text_of(o,
	    "protected")), &p) || !url_read(text_of(p, "url"), &u) ||
	    !url_read(url, &v) || !same(u.authority, v.authority) ||
	    !same(url_target(&u), url_target(&v)))
		broke("what is signed is not for the URL of the request");
	if (!is_b64(text_of(p, "nonce")) || !text_of(o, "signature").n)
		broke("a request has no nonce or no signature");
}

/* One request, off the front of what was sent to a host. */
static void
check_request(Str *s, const char *host, unsigned port)
{
	Str l = cut(s, '\n'), method = cut(&l, ' '), target = cut(&l, ' ');
	Str at = NONE, url, body;
	unsigned long length = 0, n;
	struct url u;

	if (!is(l, "HTTP/1.1\r") || (!is(method, "GET") && !is(method,
	    "HEAD") && !is(method, "POST") && !is(method, "CONNECT")))
		broke("a request line is malformed");
	while (!is(l = cut(s, '\n'), "\r")) {
		Str name = cut(&l, ' '), value = cut(&l, '\r');

		if (l.n || !s->n)
			broke("a request header is malformed");
		if (is(name, "Host:"))
			at = value;
		if (is(name, "Content-Length:"))
			number(value, SENT, &length);
	}
	if (length > s->n)
		broke("a request is not whole");
	body = (Str){ s->p, length };
	*s = from(*s, length);
	if (is(method, "CONNECT"))
		return;
	url = text("https://%%", at, target);
	if (!url_read(url, &u) || !number(u.port, MAX_PORT, &n))
		broke("a request has no URL");
	if ((!same_nocase(u.host, str(host)) && !same(ip_bytes(u.host),
	    ip_bytes(str(host)))) || (port && n != port))
		broke("a request is sent to another host than it names");
	check_origin(method, url);
	if (is(method, "POST"))
		check_signed(body, url);
	else if (length)
		broke("a request without a signature has a body");
}

static void
check_requests(void)
{
	memset(&policy, 0, sizeof policy);
	policy.renewal = strcmp(words[1], "renewal-info") == 0;
	for (size_t i = 0; i < w.nconnection; i++) {
		size_t end = i + 1 < w.nconnection ? w.connection[i + 1].from :
		    w.nsent;
		unsigned port = w.connection[i].port;
		Str s = { sent + w.connection[i].from, end -
		    w.connection[i].from };

		while (s.n)
			check_request(&s, w.connection[i].host, port == 3128 ?
			    0 : port);
	}
}

/* The status with which the next step reads what this one printed. */
static int
next_status(Str s)
{
	forget();
	return reading(keep_copy(0, s), false);
}

/* On a pipe the next step ends with the status of the one that failed. */
static void
check_failed_line(Str s, int status)
{
	Str rest = s, l = NONE;

	while (rest.n)
		l = cut(&rest, '\n');
	if (!begins(l, "failed "))
		broke("a step that fails does not tell the next");
	if (next_status(s) != status)
		broke("the next step ends with another status");
}

/* What a step wrote and how it ended. */
static void
check_step(const struct command *c, int status)
{
	bool raw = !c || strcmp(c->name, "get") == 0 ||
	    strcmp(c->name, "post") == 0 || strcmp(c->name, "json") == 0;
	bool record_out = c && c->needs & RECORD_OUT && !opt['o'];
	Str s = out_str();

	if (show)
		printf("# exit status %d of %s\n%.*s%.*s%.*s\n", status,
		    words[1] ? words[1] : "", (int)w.nsent, (char *)sent,
		    (int)w.nout, (char *)out_text, (int)w.nerr,
		    (char *)err_text);
	if (!raw)
		check_lines(s, "a control character is in the output");
	if (status > 1 && record_out && w.piped)
		check_failed_line(s, status);
	else if (status > 1 && s.n)
		broke("a step that fails prints a result");
	if (status == DONE && record_out && s.n && strcmp(c->name,
	    "directory") != 0 && !contains(s, S("common options:")) &&
	    next_status(s) >= 0)
		broke("the record of a step is not read by the next");
	forget();
	check_requests();
}

/*
 * The responses of the input, each ended by NUL and n.  The Content-Length
 * of each becomes what it has, so that a change of the body is no more than
 * that.
 */
static Str
framed(Str s)
{
	unsigned char *to = malloc(s.n * 12 + 64), *o = to;

	while (s.n) {
		const unsigned char *end = memmem(s.p, s.n, "\0n", 2);
		Str part = { s.p, end ? (size_t)(end - s.p) + 2 : s.n };
		const unsigned char *body = memmem(part.p, part.n,
		    "\r\n\r\n", 4), *at = body ? memmem(part.p,
		    (size_t)(body + 4 - part.p), "\r\nContent-Length: ",
		    18) : NULL;

		s = from(s, part.n);
		if (at) {
			size_t n = (size_t)(at + 18 - part.p);

			o = mempcpy(o, part.p, n);
			n = part.n - (size_t)(body + 4 - part.p);
			o += sprintf((char *)o, "%zu\r", end ? n - 2 : n);
			at = memchr(at + 2, '\n', (size_t)(body + 4 - at -
			    2));
			part = from(part, (size_t)(at - part.p));
		}
		o = mempcpy(o, part.p, part.n);
	}
	return (Str){ to, (size_t)(o - to) };
}

/* A whole step, one of the rows, before a CA that sends the input. */
static void
fuzz_step(void)
{
	size_t i = take_byte() % nrow;
	unsigned c = take_byte();
	Str net = framed(input);
	int status;

	memcpy(words, row[i].word, sizeof row[i].word);
	nwords = row[i].n;
	words[nwords] = NULL;
	begin_run(file_text(row[i].in), net, c & 0xfe ? c << 8 | 1 : 0);
	w.piped = c & 1;
	w.environment = row[i].environment;
	load_keys();
	status = ends(run(nwords, words); leave(DONE));
	check_step(find_command(words[1]), status);
	free((void *)net.p);
}

/* A command line, one word a line, and no CA; the first: standard input. */
static void
fuzz_args(void)
{
	char *text = split_input();
	const struct command *c = NULL;
	int status;

	if (nwords > 1 && strcmp(words[1], "key") != 0) {
		begin_run(file_text(words[0]), NONE, 0);
		load_keys();
		status = ends(run(nwords, words); leave(DONE));
		for (size_t i = 0; i < COUNT(commands); i++)
			if (strcmp(words[1], commands[i].name) == 0)
				c = &commands[i];
		check_step(c, status);
	}
	free(text);
}

/* ------------------------------------------------------------ targets -- */

static const struct {
	const char *name;
	void (*run)(void);
} targets[] = {
#define ROW(name) { #name, fuzz_##name }
	ROW(json), ROW(quote), ROW(http), ROW(link), ROW(record), ROW(cert),
	ROW(due), ROW(key), ROW(request), ROW(csr), ROW(chain), ROW(validate),
	ROW(question), ROW(answer), ROW(look), ROW(responder), ROW(box),
	ROW(eab), ROW(time), ROW(url), ROW(proxy), ROW(args), ROW(step),
};
static void (*target)(void);

/* Read a file of the machine. */
static void
load(const char *dir, const char *name)
{
	char path[PATH_MAX];
	FILE *f;

	snprintf(path, sizeof path, "%s/%s", dir, name);
	snprintf(file[nfile].name, sizeof file[0].name, "%s", name);
	file[nfile].p = malloc(1 << 16);
	if (!(f = fopen(path, "r")))
		abort();
	file[nfile].n = fread(file[nfile].p, 1, 1 << 16, f);
	nfile++;
	fclose(f);
}

#undef getenv
#undef opendir

/*
 * The input lies at the end of this, before a page that cannot be read:
 * BearSSL, which was compiled without ASan, cannot go beyond it either.
 */
static unsigned char *room;

/* FUZZ_FILES is a directory: the only files that there are. */
int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	const char *name = strrchr((*argv)[0], '/');
	const char *dir = getenv("FUZZ_FILES");
	DIR *list = dir ? opendir(dir) : NULL;
	static char *no_environment[1];
	struct dirent *e;
	Str all;

	name = name ? name + 1 : (*argv)[0];
	for (size_t t = 0; t < COUNT(targets); t++)
		if (strcmp(name, targets[t].name) == 0)
			target = targets[t].run;
	if (!target || !list) {
		for (size_t t = 0; t < COUNT(targets); t++)
			puts(targets[t].name);
		exit(!!target);
	}
	room = mmap(NULL, ROOM + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE |
	    MAP_ANONYMOUS, -1, 0);
	if (room == MAP_FAILED || mprotect(room + ROOM, PAGE, PROT_NONE) != 0)
		abort();
	while ((e = readdir(list)))
		if (*e->d_name != '.')
			load(dir, e->d_name);
	closedir(list);
	show = getenv("FUZZ_SHOW") != NULL;
	environ = no_environment;
	if (__stop_acme_data - __start_acme_data > (long)sizeof
	    data_at_first || (uintptr_t)__stop_acme_bss % 8)
		abort();
	copy(data_at_first, __start_acme_data,
	    (size_t)(__stop_acme_data - __start_acme_data));
	begin_run(NONE, NONE, 0);
	if (ends(key_read(&account_key, "account.pem"),
	    key_read(&other_key, "example.pem")) >= 0)
		abort();
	saved_key = account_key;
	saved_other = other_key;
	all = file_text("commands");
	read_rows(strndup((const char *)all.p, all.n));
	return 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *p, size_t n)
{
	if (n > ROOM)
		abort();
	__asan_unpoison_memory_region(room, ROOM);
	__asan_poison_memory_region(room, ROOM - n);
	file[0].p = room + ROOM - n;
	file[0].n = n;
	memcpy(file[0].p, p, n);
	input = (Str){ file[0].p, n };
	begin_run(NONE, NONE, 0);
	target();
	return 0;
}
END
}

# ------------------------------------------------------------- coverage --

# All tests run with a program that counts.  The counters are a file that
# is mapped into each process, so they outlast _exit(), SIGKILL and what
# the responder gives up, and processes that run side by side lose no count.
# What another user runs adds to the same file.  The path is compiled in:
# some tests empty the environment.
coverage() {
	chmod 755 "$tmp"
	mkdir counts programs
	chmod 777 counts programs
	counted="-fprofile-instr-generate=$tmp/counts/%m%c.profraw \
-fprofile-update=atomic -fcoverage-mapping -mllvm -runtime-counter-relocation"
	# Programs of the tests that include acme.c count too.  They are
	# kept, since llvm-cov reads in them what each counter is for.
	cat >cc <<-EOF
	#!/bin/sh
	case " \$* " in
	*" -I"*)	;;
	*)		exec cc "\$@" ;;
	esac
	clang $counted -isystem /usr/include/bearssl "\$@" || exit
	while [ \$# -gt 1 ]; do
		[ "\$1" != -o ] || cp "\$2" "\$(mktemp $tmp/programs/XXXXXX)"
		shift
	done
	EOF
	chmod 755 cc
	group 'coverage'
	# It is bound at its start: the loader would save registers, which
	# can hold secrets, deeper in the stack than the program wipes.
	# shellcheck disable=SC2086	# options
	check 'a program that counts' '
	    clang -std=c99 -O1 -w $counted -isystem /usr/include/bearssl \
		-Wl,-z,now -o acme-step-cov "$src/acme.c" -lbearssl &&
	    ./acme-step-cov version && chmod 666 counts/*'
	[ "$bad" = 0 ] || finish
	CC=$tmp/cc sh "$src/test.sh" check "$tmp/acme-step-cov" 2>&1 |
	tee tests | grep -v '^[0-9]* passed, '
	n=$((n + $(grep -c -e '^ok' -e '^not ok' tests)))
	bad=$((bad + $(grep -c '^not ok' tests)))
	group 'coverage'
	check 'the tests came to their end' 'tail -n 1 tests | grep " passed, "'
	check 'what was counted can be read' counts
	summary
	check 'at least 95 % of the lines' '
	    awk "/^lines / { good = \$(NF - 1) >= 95 } END { exit !good }" \
		summary'
	finish
}

counts() {
	set -- acme-step-cov
	for program in programs/*; do
		[ ! -e "$program" ] || set -- "$@" -object "$program"
	done
	llvm-profdata merge -o profile counts/*.profraw &&
	llvm-cov export "$@" -instr-profile profile -format lcov \
	    -skip-functions "$src/acme.c" >lcov && grep -c '^DA:' lcov
}

# Lines are those with code, without those of a comment or a brace alone.
summary() {
	awk '
	function percent(what, part, all) {
		printf "%-31s%5d of %5d  %5.1f %%\n", what, part, all,
		    all ? int(1000 * part / all) / 10 : 0
	}
	NR == FNR {
		split($0, word, /[:,]/)
		if (word[1] == "DA")
			count[word[2]] = word[3]
		else
			total[word[1]] = word[2]
		next
	}
	/^\/\* -+ [0-9]+\. .* -- \*\/$/ {
		gsub(/^\/\* -+ | -+ \*\/$/, "")
		title[++sections] = $0
	}
	{
		code = $0
		gsub(/\/\*([^*]|\*[^\/])*\*\//, "", code)
		if (comment && !sub(/^.*\*\//, "", code))
			code = ""
		else
			comment = sub(/\/\*.*/, "", code)
	}
	code ~ /[[:alnum:]]/ && FNR in count {
		all[sections]++
		lines++
		if (count[FNR] > 0) {
			ran[sections]++
			good++
		} else
			missed = missed sprintf("%5d %s\n", FNR, $0)
	}
	END {
		percent("lines", good, lines)
		percent("functions", total["FNH"], total["FNF"])
		percent("branches", total["BRH"], total["BRF"])
		print "\nLines of the sections:"
		for (i = 1; i <= sections; i++)
			if (all[i])
				percent(title[i], ran[i], all[i])
		printf "\nLines that no test runs:\n%s\n", missed
	}' lcov "$src/acme.c" >summary
	cat summary
}

case $task in
check|offline)	;;
*)		"$task"; exit ;;
esac

# ---------------------------------------------------------------- tests --

mkdir hostile && cd hostile || exit 1

# misuse CODE...: refused as wrong usage, with a message and no output.
misuse() {
	check "misuse: $*" "{ $*; } >out 2>err; got=\$?; cat out err
	    [ \$got = 64 ] && [ ! -s out ] && grep -q acme-step err"
}

# is TEXT CODE...: the code prints the text, and succeeds.
is() {
	text=$1; shift
	got=$(eval "$*") && [ "$got" = "$text" ] && return
	printf 'wanted: %s\ngot:    %s\n' "$text" "$got"
	return 1
}

group 'inside: encodings, times, origins and name constraints'

# In the tests inside, acme.c is included with its main renamed.

cat >unit.c <<'END'
#define main acme_main
#include "acme.c"
#undef main
static int bad;
static void
equal(Str a, Str b, int line)
{
	if (!same(a, b))
		bad = printf("line %d: %.*s\n", line, (int)a.n, a.p);
}
#define IS(a, b) equal(a, S(b), __LINE__)
/* An address and a mask of so many bits, as a base. */
static Str
subnet(const char *address, size_t bits)
{
	Str ip = ip_bytes(str(address));
	unsigned char mask[16] = { 0 };

	for (size_t i = 0; i < bits; i++)
		mask[i / 8] |= (unsigned char)(0x80 >> i % 8);
	return cat(NONE, ip, (Str){ mask, ip.n });
}
static Str
subtree(int tag, Str base)
{
	return seq(der(tag, base));
}
/* What constraints of these bases say of a name: RFC 5280 4.2.1.10. */
static void
judge(int line, const char *permitted, const char *excluded, Str name,
    bool want)
{
	struct constraints k = { NONE, NONE };

	if (permitted)
		k.permitted = subtree(DNS_NAME, str(permitted));
	if (excluded)
		k.excluded = subtree(DNS_NAME, str(excluded));
	if (!are_subtrees(k.permitted) || !are_subtrees(k.excluded) ||
	    allows(&k, DNS_NAME, name) != want)
		bad = printf("line %d: %.*s\n", line, (int)name.n, name.p);
}
#define ALLOWS(p, x, name) judge(__LINE__, p, x, S(name), true)
#define FORBIDS(p, x, name) judge(__LINE__, p, x, S(name), false)
static void
judge_ip(int line, Str base, const char *address, bool within)
{
	struct constraints k = { subtree(IP_NAME, base), NONE };
	struct constraints x = { NONE, subtree(IP_NAME, base) };
	Str ip = ip_bytes(str(address));

	if (!are_subtrees(k.permitted) || allows(&k, IP_NAME, ip) != within ||
	    allows(&x, IP_NAME, ip) == within ||
	    !allows(&k, DNS_NAME, S("a.example")))
		bad = printf("line %d: %s\n", line, address);
}
static void
constraints(void)
{
	static const char *const odd[] = { ".", "a..b", "a.", "..a", "*.a",
	    "a b", "\303\244.a" };
	unsigned char gap[] = { 192, 0, 2, 0, 255, 0, 255, 0 };

	ALLOWS("a.example", NULL, "a.example");
	ALLOWS("a.example", NULL, "b.a.EXAMPLE");
	ALLOWS("", NULL, "a.example");
	ALLOWS("a.example", NULL, "*.a.example");
	ALLOWS("a.example", "b.a.example", "c.a.example");
	FORBIDS("a.example", NULL, "ba.example");
	FORBIDS("a.example", NULL, "example");
	FORBIDS("a.example", NULL, "*.example");
	FORBIDS("a.example", NULL, "a.example.");
	FORBIDS("a.example", NULL, "b..a.example");
	FORBIDS("a.example", NULL, ".a.example");
	FORBIDS("a.example", NULL, "b\0.a.example");
	FORBIDS("a.example", NULL, "\303\244.a.example");
	FORBIDS("a.example", NULL, "b*.a.example");
	FORBIDS("a.example", NULL, "");
	FORBIDS("", NULL, "a.example.");
	ALLOWS(".a.example", NULL, "b.a.example");
	FORBIDS(".a.example", NULL, "a.example");
	FORBIDS(NULL, ".a.example", "a.example");
	FORBIDS(NULL, ".a.example", "b.a.example");
	ALLOWS(NULL, "a.example", "b.example");
	ALLOWS(NULL, "a.example", "ba.example");
	ALLOWS(NULL, "c.b.a.example", "*.a.example");
	FORBIDS(NULL, "a.example", "A.example");
	FORBIDS(NULL, "a.example", "*.a.example");
	FORBIDS(NULL, "b.a.example", "*.a.example");
	FORBIDS(NULL, "", "a.example");
	FORBIDS(NULL, "a.example", "b.example.");
	FORBIDS(NULL, "a.example", "b\0.example");
	FORBIDS("a.example", "b.a.example", "c.b.a.example");
	for (size_t i = 0; i < COUNT(odd); i++)
		if (are_subtrees(subtree(DNS_NAME, str(odd[i]))))
			bad = printf("constraint %s\n", odd[i]);
	judge_ip(__LINE__, subnet("192.0.2.0", 24), "192.0.2.255", true);
	judge_ip(__LINE__, subnet("192.0.2.9", 24), "192.0.2.255", true);
	judge_ip(__LINE__, subnet("192.0.2.0", 24), "192.0.3.0", false);
	judge_ip(__LINE__, subnet("192.0.2.0", 0), "127.0.0.1", true);
	judge_ip(__LINE__, subnet("192.0.2.1", 32), "192.0.2.1", true);
	judge_ip(__LINE__, subnet("2001:db8::", 33), "2001:db8:7fff::1", true);
	judge_ip(__LINE__, subnet("2001:db8::", 33), "2001:db8:8000::", false);
	judge_ip(__LINE__, subnet("::", 0), "192.0.2.1", false);
	if (are_subtrees(subtree(IP_NAME, (Str){ gap, 8 })) ||
	    are_subtrees(subtree(IP_NAME, (Str){ gap, 7 })) ||
	    are_subtrees(subtree(IP_NAME, (Str){ gap, 4 })) ||
	    are_subtrees(subtree(IP_NAME, NONE)) ||
	    are_subtrees(subtree(0xa2, S("a.example"))) ||
	    are_subtrees(seq(der(DNS_NAME, S("a")), der(0x80, ONE))) ||
	    are_subtrees(S("\x30\x03\x82\x05" "a")) ||
	    !are_subtrees(subtree(0x81, S("a.example"))))
		bad = puts("constraints of other kinds");
}
/* The seconds of a time are those that date(1) has, or it is malformed. */
static void
times(void)
{
	enum { BAD_TIME = -1 };
	static const struct {
		int kind;		/* 0: RFC 3339, 1: HTTP, or DER's tag */
		const char *text;
		long long seconds;
	} times[] = {
		{ 0, "2026-11-24T01:02:03.5+01:00", 1795478523 },
		{ 0, "2026-11-24T01:02:03-23:59", 1795568463 },
		{ 0, "2026-11-24t00:02:03z", 1795478523 },
		{ 0, "2026-11-24 00:02:03-00:00", 1795478523 },
		{ 0, "2016-12-31T23:59:60Z", 1483228800 },
		{ 0, "2026-11-24T01:02:03+24:00", BAD_TIME },
		{ 0, "2026-11-24T01:02:03+01:60", BAD_TIME },
		{ 0, "2026-11-24T01:02:03+01.00", BAD_TIME },
		{ 0, "2026-11-24T01:02:03+1:00", BAD_TIME },
		{ 0, "2026-11-24T01:02:03+0x:00", BAD_TIME },
		{ 0, "2026-11-24T01:02:03", BAD_TIME },
		{ 0, "2026-11-24T24:00:00Z", BAD_TIME },
		{ 0, "2026-11-24T23:60:00Z", BAD_TIME },
		{ 0, "2026-11-24T23:59:61Z", BAD_TIME },
		{ 0, "2026-11-24T01.02:03Z", BAD_TIME },
		{ 0, "2026-11-24T01:02", BAD_TIME },
		{ 0, "2026-11-24T01:2:03Z", BAD_TIME },
		{ 0, "2026-11-24+01:02:03Z", BAD_TIME },
		{ 0, "2026-13-24T01:02:03Z", BAD_TIME },
		{ 0, "2026-11-32T01:02:03Z", BAD_TIME },
		{ 0, "2026/11-24T01:02:03Z", BAD_TIME },
		{ 0, "26-11-24T01:02:03Z", BAD_TIME },
		{ 1, "Sun, 06 Nov 1994 08:49:37 GMT", 784111777 },
		{ 1, "Sun, 32 Nov 1994 08:49:37 GMT", BAD_TIME },
		{ 1, "Sun, 06-Nov-1994 08:49:37 GMT", BAD_TIME },
		{ 1, "Sun, 06 Nox 1994 08:49:37 GMT", BAD_TIME },
		{ 1, "Sun, 06 Nov 94 08:49:37 GMT", BAD_TIME },
		{ 1, "Sun, 06 Nov 1994 08.49.37 GMT", BAD_TIME },
		{ 1, "Sun, 06 Nov 1994 08:49:37 UTC", BAD_TIME },
		{ 1, "Sun, 06 Nov 1994 08:49:37", BAD_TIME },
		{ UTC_TIME, "500101000000Z", -631152000 },
		{ UTC_TIME, "491231235959Z", 2524607999 },
		{ TIME, "20500101000000Z", 2524608000 },
		{ UTC_TIME, "490001000000Z", BAD_TIME },
		{ UTC_TIME, "491301000000Z", BAD_TIME },
		{ UTC_TIME, "491232000000Z", BAD_TIME },
		{ UTC_TIME, "491231240000Z", BAD_TIME },
		{ UTC_TIME, "491231235959", BAD_TIME },
		{ UTC_TIME, "4912312359Z", BAD_TIME },
		{ UTC_TIME, "491231235959+0000", BAD_TIME },
		{ TIME, "20500101000000.5Z", BAD_TIME },
		{ TIME, "500101000000Z", BAD_TIME },
		{ OCTETS, "20500101000000Z", BAD_TIME },
	};

	for (size_t i = 0; i < COUNT(times); i++) {
		Str s = str(times[i].text);
		long long t;
		bool ok = times[i].kind == 0 ? rfc3339(s, &t) :
		    times[i].kind == 1 ? http_date(s, &t) :
		    x509_time(times[i].kind, s, &t);

		if (ok != (times[i].seconds != BAD_TIME) ||
		    (ok && t != times[i].seconds))
			bad = printf("time %s\n", times[i].text);
	}
}
/* Lengths of DER are the shortest, of 24 bits at most (X.690 10.1). */
static void
lengths(void)
{
	static unsigned char b[200] = { OCTETS };
	static const struct {
		unsigned char head[5];
		size_t n, body;
		bool ok;
	} lengths[] = {
		{ { 5 }, 1, 5, true },
		{ { 0x80 }, 1, 0, false },
		{ { 0x81, 5 }, 2, 5, false },
		{ { 0x81, 127 }, 2, 127, false },
		{ { 0x81, 128 }, 2, 128, true },
		{ { 0x82, 0, 128 }, 3, 128, false },
		{ { 0x84, 0, 0, 0, 128 }, 5, 128, false },
		{ { 0x82, 1 }, 2, 0, false },
		{ { 6 }, 1, 5, false },
	};

	for (size_t i = 0; i < COUNT(lengths); i++) {
		Str s = { b, 1 + lengths[i].n + lengths[i].body }, body, all;
		int tag;

		memcpy(b + 1, lengths[i].head, sizeof lengths[i].head);
		if (der_any(&s, &tag, &body, &all) != lengths[i].ok ||
		    (lengths[i].ok && (body.n != lengths[i].body || s.n)))
			bad = printf("length %zu\n", i);
	}
}
int
main(void)
{
	static const unsigned char ones[300] = { 1 };
	long long t;
	Str big;

	IS(b64(S("")), "");				/* RFC 4648 10 */
	IS(b64(S("f")), "Zg");
	IS(b64(S("fo")), "Zm8");
	IS(b64(S("foo")), "Zm9v");
	IS(b64(S("foob")), "Zm9vYg");
	IS(b64(S("fooba")), "Zm9vYmE");
	IS(b64(S("foobar")), "Zm9vYmFy");
	IS(b64(S("\3\354\377\340\301")), "A-z_4ME");	/* RFC 7515 C */
	IS(b64(S("{\"alg\":\"ES256\"}")),		/* RFC 7515 A.3 */
	    "eyJhbGciOiJFUzI1NiJ9");
	IS(unb64_any(S("+/8=")), "\373\377");		/* RFC 4648 4, 5 */
	IS(unb64_any(S("-_8")), "\373\377");
	IS(unb64_any(S("Zg==")), "f");
	IS(unb64_any(S("Z=g")), "");
	IS(quote(S("")), "\"\"");
	IS(quote(S("a/b")), "\"a/b\"");
	IS(quote(S("a\"b\\")), "\"a\\\"b\\\\\"");
	IS(quote(S("\n\37")), "\"\\u000a\\u001f\"");
	IS(quote(S("\303\251")), "\"\303\251\"");
	IS(der(2, S("\1")), "\x02\x01\x01");
	IS(seq(der(2, S("\1")), der(5, S(""))),
	    "\x30\x05\x02\x01\x01\x05\x00");
	big = der(4, (Str){ ones, 127 });
	IS(((Str){ big.p, 2 }), "\x04\x7f");
	big = der(4, (Str){ ones, 128 });
	IS(((Str){ big.p, 3 }), "\x04\x81\x80");
	big = der(4, (Str){ ones, 256 });
	IS(((Str){ big.p, 4 }), "\x04\x82\x01\x00");
	IS(date(-1), "1969-12-31T23:59:59Z");
	IS(date(0), "1970-01-01T00:00:00Z");
	IS(date(951782400), "2000-02-29T00:00:00Z");
	IS(date(-30000000000), "1019-05-04T18:40:00Z");
	for (int y = -700; y < 8000; y++, used = 0)
		for (int d = -1; d < 2; d++) {
			long long u, t = moment(1970 + y, 1, 1, 0, 0, 0) + d;

			if (!rfc3339(date(t), &u) || u != t)
				bad = printf("%lld\n", t);
		}
#define ORIGIN(a, b) same_origin(S("https://" a), S("https://" b))
	if (!ORIGIN("a.b", "A.B:443/x") || !ORIGIN("a:0443?x", "a/") ||
	    !ORIGIN("[::1]:5", "[0:0::1]:5/a") || ORIGIN("a", "a.") ||
	    ORIGIN("a", "b") || ORIGIN("a", "a:444") ||
	    ORIGIN("a:443", "a.b") || ORIGIN("127.0.0.1", "127.0.0.2") ||
	    ORIGIN("127.0.0.1", "[::1]") || same_origin(S(""), S("")) ||
	    same_origin(S("http://a"), S("http://a")))
		bad = puts("origins");
	if (rfc3339(S("2026-01-01\00000:00:00Z"), &t) ||
	    rfc3339(S("2026-01-01T00:00:00\00001:00"), &t))
		bad = puts("a NUL passed for another character");
	constraints();
	times();
	lengths();
	return bad != 0;
}
END
check 'base64url, JSON strings, DER, times and name constraints' \
    '${CC:-cc} -w -I"$src" unit.c -o unit -lbearssl &&
    ${RUN-} ./unit'

group 'inside: certificates and requests that are malformed'

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
    -keyout der.key -subj /CN=a.example -days 9 -outform DER -out whole.der \
    -addext subjectAltName=DNS:a.example 2>/dev/null
openssl req -new -key der.key -subj /CN=a.example -outform DER \
    -addext subjectAltName=DNS:a.example -out whole.csr
cat >der.c <<'END'
#define main acme_main
#include "acme.c"
#undef main
static int bad;
static Str part[9], tail;	/* of a certificate or a request */
static void
parts(Str whole)
{
	Str outer, info, body;
	int tag;

	if (!der_next(&whole, SEQUENCE, &outer) ||
	    !der_next(&outer, SEQUENCE, &info))
		abort();
	tail = outer;
	for (size_t i = 0; i < COUNT(part); i++)
		if (!der_any(&info, &tag, &body, &part[i]))
			part[i] = NONE;
}
/* The whole with part i replaced. */
static Str
made(size_t i, Str new)
{
	Str all = NONE;

	for (size_t k = 0; k < COUNT(part); k++)
		all = cat(NONE, all, k == i ? new : part[k]);
	return seq(seq(all), tail);
}
/* Write it to a file, for openssl. */
static Str
saved(const char *name, Str s)
{
	FILE *f = fopen(name, "w");

	if (!f || fwrite(s.p, 1, s.n, f) != s.n || fclose(f) != 0)
		abort();
	return s;
}
static int
is_cert(const char *name, Str s)
{
	struct cert c;

	return cert_read(saved(name, s), &c);
}
/* What BearSSL's client says to us of the server's certificate. */
static unsigned
sent(Str s, bool any)
{
	chain.any = any;
	chain.fault = NONE;
	chain_vtable.start_chain(NULL, "a.example");
	if (s.n) {
		chain_vtable.start_cert(NULL, s.n);
		chain_vtable.append(NULL, s.p, s.n);
		chain_vtable.end_cert(NULL);
	}
	return chain_vtable.end_chain(NULL);
}
#define WRONG(condition) ((condition) ? \
    (void)(bad = printf("line %d\n", __LINE__)) : (void)0)
static void
certificates(void)
{
	Str whole = read_file("whole.der"), name = seq(SUBJECT_ALT, der(OCTETS,
	    seq(der(DNS_NAME, S("a.example")))));
	struct constraints k;
	br_x509_pkey key;
	struct cert c;
	Str s;

	parts(whole);
	WRONG(!is_cert("good.1", made(7, part[7])) ||
	    !same(made(7, part[7]), whole));
	WRONG(!is_cert("good.2", made(7, der(EXTS, seq(name)))));
	WRONG(is_cert("bad.1", made(7, der(EXTS, seq(name, ONE)))));
	WRONG(is_cert("bad.2", made(7, der(EXTS, seq(seq(SUBJECT_ALT))))));
	WRONG(is_cert("bad.3", made(7, cat(NONE, der(EXTS, seq(name)),
	    der(EXTS, seq(name))))));
	WRONG(is_cert("bad.4", made(7, der(EXTS, ONE))));
	WRONG(is_cert("bad.5", made(7, S("\xa3\x05"))));
	WRONG(is_cert("bad.6", made(1, der(OCTETS, S("\1")))));
	WRONG(is_cert("bad.7", made(4, seq(ONE, ONE))));
	WRONG(is_cert("bad.8", made(2, NONE)));
	WRONG(is_cert("bad.9", der(SET, from(whole, 4))));

	/* A subject is a SEQUENCE (RFC 5280 4.1.2.4). */
	s = made(5, der(SET, from(part[5], 2)));
	saved("bad.10", s);
	WRONG(!cert_read(s, &c) || common_name(c.subject).n);
	WRONG(!cert_read(whole, &c) ||
	    !is(common_name(c.subject), "a.example"));

	WRONG(!key_in(part[6], &key));
	saved("bad.11", made(6, seq(ONE)));
	WRONG(key_in(seq(ONE), &key) || key_in(ONE, &key));
	/* An RSAPublicKey is a SEQUENCE of two (RFC 8017 A.1.1). */
	s = algorithm_of(key_type("rsa2048")->public);
	saved("key.1", seq(s, bits(ONE)));
	saved("key.2", seq(s, bits(seq(ONE))));
	WRONG(key_in(seq(s, bits(ONE)), &key) ||
	    key_in(seq(s, bits(seq(ONE))), &key));

	c.extensions = seq(der(OID, NAME_CONSTRAINTS), der(OCTETS, seq(NONE)));
	WRONG(!read_constraints(&c, &k));
	c.extensions = seq(der(OID, NAME_CONSTRAINTS), der(OCTETS, ONE));
	WRONG(read_constraints(&c, &k));
	c.extensions = seq(der(OID, NAME_CONSTRAINTS),
	    der(OCTETS, cat(NONE, seq(NONE), seq(NONE))));
	WRONG(read_constraints(&c, &k));

	WRONG(sent(whole, true) != 0);
	WRONG(sent(NONE, true) != BR_ERR_X509_UNEXPECTED);
	WRONG(sent(made(7, der(EXTS, ONE)), true) != BR_ERR_X509_UNEXPECTED);
	WRONG(sent(made(6, seq(ONE)), true) != BR_ERR_X509_UNSUPPORTED);
	WRONG(sent(whole, false) != BR_ERR_X509_NOT_TRUSTED || chain.fault.n);
	WRONG(sent(made(7, der(EXTS, ONE)), false) == 0 ||
	    !is(chain.fault, "a certificate in its chain is malformed"));
	/* What we do not read so strictly, BearSSL does. */
	s = saved("bad.12", made(0, der(VERSION_0, der(OCTETS, S("\2")))));
	WRONG(sent(s, false) != BR_ERR_X509_UNEXPECTED || chain.fault.n ||
	    !is(chain_fault(BR_ERR_X509_UNEXPECTED), "a certificate in its "
	    "chain is malformed (BearSSL error 41)"));
}
static int
is_request(const char *name, Str s)
{
	struct cert c;
	bool genuine;

	return csr_read(saved(name, s), &c, &genuine);
}
static void
requests(void)
{
	Str whole = read_file("whole.csr"), key, s;
	bool genuine;
	struct cert c;

	parts(whole);
	WRONG(!csr_read(whole, &c, &genuine) || !genuine ||
	    !is(c.alt_names, "\x82\x9" "a.example"));
	WRONG(!same(made(3, part[3]), whole));
	WRONG(is_request("request.1", made(3, der(ATTRS, ONE))));
	WRONG(is_request("request.2", made(3, der(ATTRS, seq(ONE)))));
	WRONG(is_request("request.3", made(3, der(ATTRS, seq(EXTENSIONS,
	    ONE)))));
	WRONG(is_request("ours.1", made(3, der(ATTRS, seq(EXTENSIONS,
	    der(SET, ONE))))));
	WRONG(is_request("ours.2", made(3, der(ATTRS, seq(EXTENSIONS,
	    der(SET, seq(ONE)))))));
	/* A signature verifies by a key; by what is none, never. */
	s = algorithm_of(key_type("rsa2048")->signature);
	key = algorithm_of(key_type("rsa2048")->public);
	WRONG(verifies(seq(key, bits(ONE)), s, whole, S("\0x")));
	WRONG(verifies(seq(key, bits(seq(ONE))), s, whole, S("\0x")));
	WRONG(verifies(ONE, s, whole, S("\0x")));
	WRONG(verifies(seq(key, ONE), s, whole, S("\0x")));
}
int
main(void)
{
	certificates();
	requests();
	return bad != 0;
}
END
check 'what is malformed is refused' '
    ${CC:-cc} -w -I"$src" der.c -o der -lbearssl && ${RUN-} ./der'
check 'openssl refuses it, too' '
    for file in good.*; do
	openssl x509 -inform DER -in "$file" -noout -ext subjectAltName || exit
    done
    for file in bad.*; do
	echo "$file"
	not openssl x509 -inform DER -in "$file" -noout -pubkey \
	    -ext subjectAltName || exit
    done
    for file in key.*; do
	echo "$file"; not openssl pkey -pubin -inform DER -in "$file" || exit
    done
    for file in request.*; do
	echo "$file"
	not openssl req -inform DER -in "$file" -noout || exit
    done'

cat >way.c <<'END'
#define main acme_main
#include "acme.c"
#undef main
static int bad;
#define WRONG(condition) ((condition) ? \
    (void)(bad = printf("line %d\n", __LINE__)) : (void)0)
int
main(void)
{
	int fd[2];

	/* An attempt fails when its time is over, and makes place. */
	begin_way();
	WRONG(has_failed(LOOKUPS) || socketpair(AF_UNIX, SOCK_STREAM, 0, fd));
	way.fd[LOOKUPS].fd = fd[0];
	way.until[LOOKUPS] = now_ms() + 9999;
	WRONG(has_failed(LOOKUPS) || free_attempt() != LOOKUPS + 1);
	way.until[LOOKUPS] = now_ms();
	WRONG(!has_failed(LOOKUPS) || way.error != ETIMEDOUT ||
	    way.fd[LOOKUPS].fd != -1 || close(fd[0]) == 0);
	WRONG(free_attempt() != LOOKUPS);
	/* So does an error of its descriptor; the first one counts. */
	way.fd[LOOKUPS] = (struct pollfd){ fd[1], POLLIN, POLLIN };
	way.until[LOOKUPS] = now_ms();
	WRONG(has_failed(LOOKUPS));
	way.fd[LOOKUPS] = (struct pollfd){ open("/dev/null", O_RDONLY), POLLIN,
	    POLLERR };
	WRONG(!has_failed(LOOKUPS) || way.error != ENOTSOCK);
	note_error(ENETUNREACH);
	WRONG(way.error != ENOTSOCK);
	/* There are as many at a time as there are places. */
	for (size_t i = LOOKUPS; i < COUNT(way.fd); i++)
		way.fd[i].fd = 1;
	add_ip(ip_bytes(S("127.0.0.1")));
	WRONG(free_attempt() != 0 || start_attempt(htons(9)) || !has_untried());
	return bad != 0;
}
END
check 'attempts to connect that time out, fail late or find no place' '
    ${CC:-cc} -w -I"$src" way.c -o way -lbearssl && ${RUN-} ./way'

group 'offline: JSON'

# takes STATUS FORMAT: read a list of texts, one a line, and print those
# that json does not end so with; FORMAT is %s, or %b to undo escapes.
takes() {
	wrong=0
	while IFS= read -r text; do
		# shellcheck disable=SC2059
		printf "$2" "$text" >json
		"$acme" json . json >out 2>err
		got=$?
		[ "$got" = "$1" ] && continue
		wrong=1
		echo "$got: $text"
	done
	return "$wrong"
}

cat >good <<'END'
[[]   ]
[""]
[]
["a"]
[false]
[null, 1, "1", {}]
[null]
 [1]
[1,null,null,null,2]
[2] 
[123e65]
[0e+1]
[0e1]
[ 4]
[-0.000000000000000000000000000000000000000000000000000000000000000001]
[20e1]
[-0]
[-123]
[-1]
[1E22]
[1E-2]
[1E+2]
[123e45]
[123.456e78]
[1e-2]
[1e+2]
[123456789012345678901234567890123456789012345678901234567890]
[1e999999999999]
[123.456789]
{"asd":"sdf", "dfg":"fgh"}
{"asd":"sdf"}
{"a":"b","a":"c"}
{"a":"b","a":"b"}
{}
{"":0}
{"foo\u0000bar": 42}
{ "min": -1.0e+28, "max": 1.0e+28 }
{"x":[{"id": "x"}], "id": "x"}
{"a":[]}
{"title":"\u041f\u043e\u043b\u0442\u043e\u0440\u0430" }
["\u0060\u012a\u12AB"]
["\uD801\udc37"]
["\ud83d\ude39\ud83d\udc8d"]
["\"\\\/\b\f\n\r\t"]
["\\u0000"]
["\""]
["a/*b*/c/*d//e"]
["\\a"]
["\\n"]
["\u0012"]
["\uFFFF"]
[ "asd"]
["new\u00A0line"]
["\u0000"]
["\u002c"]
["π"]
["asd "]
" "
["\uDBFF\uDFFF"]
["\u0821"]
["\u0123"]
["\u0061\u30af\u30EA\u30b9"]
["new\u000Aline"]
["\uA66D"]
["\u005C"]
["⍂㈴⍂"]
["\u0022"]
["\u200B"]
["\u2064"]
["\uFDD0"]
["\uFFFE"]
["€𝄞"]
["aa"]
false
42
-0.1
null
"asd"
true
""
[true]
END

cat >bad-texts <<'END'

[1 true]
[1]x
["": 1]
[""],
[,1]
[1,,2]
["x",,]
["x"]]
["",]
["x"
[x
[3[4]]
[1:2]
[,]
[-]
[   , ""]
[1,]
[1,,]
[*]
[""
[1,
[{}
[fals]
[nul]
[tru]
[++1234]
[+1]
[+Inf]
[-01]
[-1.0.]
[-2.]
[-NaN]
[.-1]
[.2e-3]
[0.1.2]
[0.3e+]
[0.3e]
[0.e1]
[0E+]
[0E]
[0e+]
[0e]
[1.0e+]
[1.0e-]
[1.0e]
[1 000.0]
[1eE2]
[2.e+3]
[2.e-3]
[2.e3]
[9.e+]
[Inf]
[NaN]
[1+2]
[0x1]
[0x42]
[Infinity]
[0e+-1]
[-123.123foo]
[-Infinity]
[-foo]
[- 1]
[-012]
[-.123]
[-1x]
[1ea]
[1.]
[.123]
[1.2a-3]
[1.8011670033376514H-308]
[012]
["x", truth]
{[: "x"}
{"x", null}
{"x"::"b"}
{"a":"a" 123}
{key: 'value'}
{"a" b}
{:"b"}
{"a"
{"a":
{1:1}
{9999E9999:1}
{null:null,null:null}
{"id":0,,,,,}
{'a':0}
{"id":0,}
{"a":"b"}/**/
{"a":"b"}/**//
{"a":"b"}//
{"a":"b"}/
{"a":"b",,"c":"d"}
{a: "b"}
{"a":"a
{ "foo" : "bar", "a" }
{"a":"b"}#
 
["\uD800\"]
["\uD800\u"]
["\uD800\u1"]
["\uD800\u1x"]
["\x00"]
["\\\"]
["\🌀"]
["\"]
["\u00A"]
["\uD834\uDd"]
["\uD800\uD800\x"]
["\a"]
["\uqqqq"]
[\u0020"asd"]
[\n]
"
['single quote']
abc
["\
"\u00"
""x
<.>
[<null>]
[1]]
[True]
1]
{"x": true,
[][]
]
2@
{}}
{"":
{"a":/*comment*/"b"}
{"a": true} "x"
['
[,
[{
["a
["a"
{
{]
{,
{[
{"a
{'a'
["\{["\{["\{["\{
*
{"a":"b"}#{}
[\u000A""]
["asd]
aå
[true
é
END
cat >bad-bytes <<'END'
[1\0001]
[\00051]
["a\0000b"]
["a\nb"]
["a\tb"]
["\037"]
\0377\0376[\0000]\0000
[1\0377]
[\0340\0240]
[\0014]
123\0000
"x"\0000
[\a]
["a",\n4\n,1,
["\\\\\0345"]
["\0377"]
["\0300\0257"]
["\0340\0200\0257"]
["\0355\0240\0200"]
["\0364\0277\0277\0277"]
["\0201"]
["\0351"]
["\0342\0202"]
END

check 'good texts are read' 'takes 0 %s <good'
check 'bad texts are refused' 'takes 65 %s <bad-texts'
check 'bad bytes are refused' 'takes 65 %b <bad-bytes'
check 'lone surrogates never become bad UTF-8' '
	for s in "\ud800" "\udc00x" "\ud800\ud800" "\ud800A" "\ud83d\u0041"
	do
		printf "{\"a\":\"%s\"}" "$s" >json
		"$acme" json a json >out 2>err
		case $? in 0|65) ;; *) echo "$s"; exit 1 ;; esac
		iconv -f UTF-8 -t UTF-8 out >/dev/null || exit
	done'

group 'offline: the values of JSON'

cat >object <<'END'
{"a": {"b": [1, "x", {"c": "deep"}], "": "none", "0": "zero"},
 "s": "q\"b\\s\/\u00e9\ud83d\ude39", "n": -1.50e+2, "t": true, "z": null,
 "big": 123456789012345678901234567890, "l": ["one", 2, [3], {"four": 4}],
 "\u0065sc": "found", "same": 1, "empty": [], "o": {}}
END
value() {
	check "json $1" "is '$2' '\"\$acme\" json $1 object'"
}
value a.b.0 1
value a.b.1 x
value a.b.2.c deep
value a.0 zero
value s 'q"b\s/é😹'
value n -1.50e+2
value t true
value z null
value big 123456789012345678901234567890
value l 'one
2
[3]
{"four": 4}'
value a.b.2 '{"c": "deep"}'
value esc found
value empty ''
value o '{}'
check 'json reads standard input' \
    'is x "\"\$acme\" json a.b.1 <object"'
for path in b a.c a.b.3 a.b.x a.b.-1 a.b.00 s.0 n.x z.z t.t; do
	check "json $path is absent" "\"\$acme\" json $path object >out
	    [ \$? = 1 ] && [ ! -s out ]"
done
dies 65 JSON '"$acme" json a /dev/null'
dies 65 JSON '"$acme" json a </dev/null'
dies 66 'none.json' '"$acme" json a none.json'
dies 66 . '"$acme" json a .'
nested() {
	{ head -c "$1" /dev/zero | tr '\0' '['
	printf 1
	head -c "$1" /dev/zero | tr '\0' ']'; } >json
}
check 'nesting of 20 is read' 'nested 20; "$acme" json . json'
dies 65 . 'nested 100000; "$acme" json . json'
dies 65 . 'head -c 100000 /dev/zero | tr "\0" "[" | "$acme" json .'
dies 65 . 'yes "{\"a\":" | head -n 50000 | "$acme" json .'
check 'a file of 100 kB is read' '
	{ printf "[0"; yes ,1234567 | head -n 12000; echo "]"; } >json
	"$acme" json 11999 json'
dies 74 . '"$acme" json a.b.1 object >&-'

group 'offline: keys'

types='ec256 ec384 rsa2048 rsa3072 rsa4096'
# The large RSA keys take seconds, and minutes in an emulator: all at once.
making=''
for type in $types; do
	(umask 0; "$acme" key -T 3000 -t "$type" -o "$type.pem" \
	    >"$type.log" 2>&1) &
	making="$making $!"
done
for pid in $making; do
	wait "$pid"
done
for type in $types; do
	check "key -t $type" "cat $type.log; [ ! -s $type.log ] &&
	    head -n 1 $type.pem | grep -qx -e '-----BEGIN PRIVATE KEY-----' &&
	    openssl pkey -in $type.pem -noout -check &&
	    is 600 'stat -c %a $type.pem'"
done
check 'the sizes are right' '
	for t in "ec256 256 bit" "ec384 384 bit" "rsa2048 2048 bit" \
	    "rsa3072 3072 bit" "rsa4096 4096 bit"
	do
		openssl pkey -in "${t%% *}.pem" -noout -text |
		    grep -q "${t#* }" || exit
	done'
check 'the default is ec256' '"$acme" key -o default.pem &&
    openssl pkey -in default.pem -noout -text | grep -q P-256'
check 'the mode is 0600 under a narrow umask' '
	umask 0777; "$acme" key -o narrow.pem && is 600 "stat -c %a narrow.pem"'

echo precious >precious
check 'a file is never replaced' '
	"$acme" key -o precious 2>err; [ $? = 73 ] &&
	grep precious err && is precious "cat precious"'
dies 73 precious '"$acme" key -o precious'
dies 73 ec256.pem '"$acme" key -t rsa2048 -o ec256.pem'
ln -s nowhere dangling
dies 73 dangling '"$acme" key -o dangling'
check 'a dangling link is not followed' '[ ! -e nowhere ]'
dies 73 missing '"$acme" key -o missing/key.pem'
dies 73 hostile '"$acme" key -o "$tmp/hostile"'
dies 73 precious '"$acme" key -o precious/key.pem'
check 'nothing is left behind' '! find . -name "*key.pem*" | grep .'

# A disk of two pages, and the output of a program in it.
check 'a full disk: 74, and no key' '
	mkdir -p disk
	unshare -m sh -c "mount -t tmpfs -o size=8k none disk &&
		head -c 8192 /dev/zero >disk/fill
		\"\$1\" key -o disk/key.pem 2>err; got=\$?
		ls disk; cat err
		[ \$got = 74 ] && [ \"\$(ls disk)\" = fill ]" sh "$acme"'
dies 74 . '"$acme" csr -K ec256.pem a.example >/dev/full'
dies 74 . '"$acme" json a.b.1 object >/dev/full'
dies 74 . '"$acme" thumbprint -k ec256.pem >/dev/full'

for type in $types; do
	check "thumbprint of $type, by openssl" \
	    "is \"\$(oracle $type.pem)\" '\"\$acme\" thumbprint -k $type.pem'"
done

# ec_key CURVE HEX: a key with this private value and no public half,
# which a reader has to work out.
ec_key() {
	printf '%s\n' asn1=SEQUENCE:k '[k]' v=INTEGER:1 \
	    "d=FORMAT:HEX,OCTETSTRING:$2" p=EXPLICIT:0,OID:"$1" >asn1.cnf
	openssl asn1parse -genconf asn1.cnf -noout -out ec.der
	printf '%s\n' '-----BEGIN EC PRIVATE KEY-----' \
	    "$(openssl base64 -in ec.der)" '-----END EC PRIVATE KEY-----'
}
# The keys 379 and 43 of P-256, 197 and 176 of P-384 are the first whose
# x, and whose y, begins with a zero byte.
for key in P-256:prime256v1:%064x:379 P-256:prime256v1:%064x:43 \
    P-384:secp384r1:%096x:197 P-384:secp384r1:%096x:176; do
	number=${key##*:} rest=${key%:*}
	format=${rest##*:} rest=${rest%:*}
	# shellcheck disable=SC2059
	ec_key "${rest#*:}" "$(printf "$format" "$number")" >short.pem
	check "${rest%:*}, key $number: the coordinate keeps its zeros" \
	    'jwk short.pem | grep -q "\"A[A-P]" &&
	    is "$(oracle short.pem)" "\"\$acme\" thumbprint -k short.pem"'
done

# RFC 7515 A.3
ec_key prime256v1 \
    8e9b109e719098bf980487df1f5d77e9cb29606ebed2263b5f57c213df84f4b2 \
    >rfc7515.pem
check 'RFC 7515 A.3: the key' 'is "$(printf %s "{\"crv\":\"P-256\"," \
    "\"kty\":\"EC\",\"x\":\"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU\"," \
    "\"y\":\"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0\"}" |
    openssl dgst -sha256 -binary | base64url)" \
    "\"\$acme\" thumbprint -k rfc7515.pem"'
# RFC 7517 A.2 has the private half of the example in RFC 7638 3.1.
cat >rfc7638.pem <<'END'
-----BEGIN RSA PRIVATE KEY-----
MIIEowIBAAKCAQEA0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78L
hWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc/BJECPebWKRXjBZCiFV4n3oknj
hMstn64tZ/2W+5JsGY4Hc5n9yBXArwl93lqt7/RN5w6Cf0h4QyQ5v+65YGjQR0/F
DW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbO
pbISD08qNLyrdkt+bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ+G/xBni
Iqbw0Ls1jF44+csFCur+kEgU8awapJzKnqDKgwIDAQABAoIBAF+HE7XiWP4J+BWD
7FwfK3V4seb8LINRSzeRNxGhukSaFR/hyyyg/TO3ceaKOxlEZJ3IZ60cHlJAu4U+
XySzNFmxQCjS1mNr7+wejal0s1L8U9P2En6oo8Kd0U85QWgsVqeHaBZOTdqPBsv5
xzSq6AAyJCeOqUVKIbF8sG0XgHWGjMBbPbb/Hf3D1WN4tO2t7fDDekzcJtHUmsJv
b+O1Igpd0pOWYhu8aIzy7uLG4NVNo8eCAUzQc52yUsxRyuuo0/G4JLqrJNBo7JAy
ZNfWeKsI8G7J5+I9lgYot0S/lLNpRlZGPH5Bc5ntc9B2yJH89GOpqpzmLanNF+I3
3CqAAvECgYEA83i+7IvMGXoMXCskv73TKr8637FiO7Z27zv8oj6pbWUQyLPQBQxt
PVnwD20R+60eTDmD2ujnMt5PoqMrm8RfmNhVWDtjjMmCMjOpSXicFHj7XOuVIYQy
qVWlWEh6dN36GVZYk93N8Bc9vY41xy8B9RzzOGVQzXvNEvn7O0nVbfsCgYEA3dfO
R9cuYq+0S+mkFLzgItgMEfFzB2q3hWehMuG0oCuqnb3vobLyumqjVZQO1dIrdwgT
nCdpYzBcOfW5r370AFXjiWft/NGEiovonizhKpo9VVS78TzFgxkIdrecRezsZ+1k
Yd/s1qDbxtkDEgfAITAG9LUnADun4vIcb6yelxkCgYAbiw9eRzphr3Lyglb38guP
jG6mm7SXOL8ftVORLzGPlJ1fdygTSiKZjDEiLZ6ZMC57RQ5rl2mAUbIEnhzy1DZU
XjTZdG6AoNM/xqRiEWjm0ADvtB782a25hlzcLebcjbgbYa9HmxIPFTIA3bOrwt+f
0RSazqtjc5vxh6IqROIGPQKBgQCz2UAf1+CAGygVHw5pzZH8TaDDbzatPaQY4CG8
iWURMTV5+sDqG5RS8x8FwymfyWp5bq/POdhjlJJAXukx0L9qAjecbwhunUFRvQlS
KtpE2pR8uFxBv930YXgOHt7vhZtGyhtGie6NNg3XEJo/pM7rWO9atf4vXy3FfDj3
hD9yCQKBgBsjP6eia18kos9baBYCm1lfiXSN40OMqbva2zFsd60CQX5rdBaGM4FC
GRFRRHDqsHpkTfNc6AwGmvgZNCljRg4yR2Q3Q5hYVtwDe5SPqbsZP5h2Ridda8ck
fDueVy0nt0j5kXysGSOslNuGcb0ChWCLXZXVChszuiGus0yoQFUV
-----END RSA PRIVATE KEY-----
END
check 'RFC 7638 3.1: the thumbprint' \
    'is NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs \
    "\"\$acme\" thumbprint -k rfc7638.pem"'

group 'offline: keys in all forms that are read'

# like NAME FILE: read as the same key as NAME.pem.
like() {
	check "$1 as $2" "chmod 600 $2
	    is \"\$(oracle $1.pem)\" '\"\$acme\" thumbprint -k $2 2>&1'"
}
for type in ec256 ec384; do
	{ openssl ecparam -name prime256v1
	openssl pkey -in $type.pem -traditional; } >$type.parameters
	openssl pkey -in $type.pem -traditional >$type.sec1
	like $type $type.parameters
	like $type $type.sec1
done
for type in rsa2048 rsa4096; do
	openssl pkey -in $type.pem -traditional >$type.pkcs1
	like $type $type.pkcs1
done
openssl pkcs8 -topk8 -nocrypt -in ec256.pem >ec256.pkcs8
like ec256 ec256.pkcs8
{ echo 'Bag Attributes: none'; sed 's/$/\r/' ec256.pem; } >ec256.crlf
like ec256 ec256.crlf

group 'offline: keys that are refused'

# refused NAME WORDS: NAME.pem is no key that we would use.
refused() {
	chmod 600 "$1.pem"
	dies 65 "$2" "\"\$acme\" thumbprint -k $1.pem"
	dies 65 "$2" "\"\$acme\" csr -K $1.pem a.example"
}
openssl pkey -in ec256.pem -aes128 -passout pass:x >encrypted8.pem
openssl pkey -in rsa2048.pem -traditional -aes128 -passout pass:x \
    >encrypted1.pem
refused encrypted8 encrypted
refused encrypted1 encrypted
openssl ecparam -genkey -noout -name secp521r1 -out p521.pem
openssl ecparam -genkey -noout -name secp256k1 -out k256.pem
openssl genpkey -algorithm ed25519 -out ed25519.pem
openssl genrsa -out rsa1024.pem 1024 2>/dev/null
for key in p521 k256 ed25519 rsa1024; do
	refused "$key" "$key"
done
# BearSSL reads keys of this curve; openssl would not make the next one.
ec_key secp521r1 "$(printf %064d 7)" >ec521.pem
refused ec521 'its curve is not supported'
ec_key prime256v1 "01$(printf %064d 7)" >large.pem
refused large 'its private value is too large for its curve'
sed '2,3s/..../&  /g' ec256.pem >spaces.pem
check 'spaces within the lines of a key' '
    chmod 600 spaces.pem && grep " .*  " spaces.pem >/dev/null &&
    is "$(oracle ec256.pem)" "\"\$acme\" thumbprint -k spaces.pem"'
openssl pkey -in ec256.pem -pubout -out public.pem
: >empty.pem
echo nonsense >nonsense.pem
head -n 2 ec256.pem >endless.pem
sed 's/^M/*/' ec256.pem >stars.pem
head -c 2000000 /dev/zero >zeros.pem
for key in public empty nonsense endless stars zeros; do
	refused "$key" "$key"
done
dies 66 none.pem '"$acme" thumbprint -k none.pem'
dies 66 none.pem '"$acme" csr -K none.pem a.example'
dies 66 account.pem '"$acme" thumbprint'
dies 66 . '"$acme" thumbprint -k .'

# rsa_key N D P Q DP DQ QI, each a number of bytes: a key of these sizes.
rsa_key() {
	i=0
	{
		printf '%s\n' asn1=SEQUENCE:k '[k]' v=INTEGER:0
		for size; do
			printf 'n%s=INTEGER:0x7%s\n' "$((i += 1))" \
			    "$(head -c $((2 * size - 1)) /dev/zero | tr '\0' 7)"
			[ "$i" != 1 ] || echo e=INTEGER:65537
		done
	} >asn1.cnf
	openssl asn1parse -genconf asn1.cnf -noout -out rsa.der
	printf '%s\n' '-----BEGIN RSA PRIVATE KEY-----' \
	    "$(openssl base64 -in rsa.der)" '-----END RSA PRIVATE KEY-----'
}
# BearSSL's decoder has room for 1536 bytes, and 0.6 does not look.
rsa_key 1024 1024 512 512 512 512 512 >rsa8192.pem
rsa_key 256 256 4000 128 128 128 128 >wide-p.pem
rsa_key 256 256 128 4000 128 128 128 >wide-q.pem
rsa_key 256 256 128 128 4000 128 128 >wide-dp.pem
rsa_key 256 256 128 128 128 4000 128 >wide-dq.pem
rsa_key 256 256 128 128 128 128 4000 >wide-qi.pem
rsa_key 512 512 500 500 500 500 500 >wide-all.pem
rsa_key 256 4000 128 128 128 128 128 >wide-d.pem
for key in rsa8192 wide-p wide-q wide-dp wide-dq wide-qi wide-all wide-d
do
	refused $key $key
done
ec_key prime256v1 "$(printf %064x 0)" >zero.pem
ec_key prime256v1 "$(printf %0400x 7)" >wide-ec.pem
ec_key prime256v1 \
    FFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551 \
    >order.pem
for key in zero wide-ec order; do
	refused $key $key
done

# broken NAME: no part of a key, and no key with a wrong byte, ends other
# than as a key that is good, or bad input.
pem() {
	printf '%s\n' '-----BEGIN PRIVATE KEY-----' \
	    "$(openssl base64 -in "$1")" '-----END PRIVATE KEY-----'
}
broken() {
	openssl pkcs8 -topk8 -nocrypt -in "$1.pem" -outform DER -out whole
	size=$(stat -c %s whole)
	i=0
	while [ $((i += $2)) -lt "$size" ]; do
		head -c "$i" whole >part
		pem part >part.pem
		{ cat part; printf '\377'
		tail -c +$((i + 2)) whole; } >wrong
		pem wrong >wrong.pem
		"$acme" thumbprint -k part.pem >out 2>err
		[ $? = 65 ] || { echo "the first $i bytes"; return 1; }
		"$acme" thumbprint -k wrong.pem >out 2>err
		case $? in 0|65) ;; *) echo "byte $i"; return 1 ;; esac
	done
}
umask 077
check 'broken EC keys'  'broken ec256 1'
check 'broken RSA keys' 'broken rsa2048 17'
umask 022

check 'a key that others may read: a warning' '
	cp ec256.pem open.pem; chmod 644 open.pem
	is "$(oracle ec256.pem)" "\"\$acme\" thumbprint -k open.pem 2>err" &&
	grep "^acme-step: .*open.pem is accessible to other users; run " err &&
	is 1 "wc -l <err"'
check 'a key on a read-only file system, or of another user: none' '
	mkdir -p ro other && unshare -m sh -c "
	    mount -t tmpfs none ro && cp open.pem ro/ && chmod 644 ro/open.pem
	    mount -o remount,ro none ro && \"\$1\" thumbprint -k ro/open.pem
	    " sh "$acme" 2>err && [ ! -s err ] &&
	chmod 755 "$tmp" . && cp "$acme" step.bin && chmod 755 step.bin &&
	setpriv --reuid=65534 --regid=65534 --clear-groups \
	    ./step.bin thumbprint -k open.pem 2>err && [ ! -s err ] &&
	rm step.bin'
check 'a key of ours alone: none' '
	"$acme" thumbprint -k ec256.pem 2>err && [ ! -s err ]'

openssl genpkey -algorithm ED25519 -out ed25519.pem
chmod 600 ed25519.pem
dies 65 'ed25519.pem holds an Ed25519 key; use an ec256' \
    '"$acme" thumbprint -k ed25519.pem'

group 'offline: certificate requests'

for type in $types; do
	openssl pkey -in "$type.pem" -pubout -out public.pem
	check "csr of $type" "\"\$acme\" csr -K $type.pem a.example >csr.pem &&
	    head -n 1 csr.pem |
		grep -qx -e '-----BEGIN CERTIFICATE REQUEST-----' &&
	    openssl req -in csr.pem -noout -verify &&
	    openssl req -in csr.pem -noout -pubkey | diff - public.pem"
done
# names TEXT NAME...: openssl reads TEXT in subjectAltName.
names() {
	text=$1; shift
	"$acme" csr -K ec256.pem "$@" >csr.pem &&
	    is "$text" 'openssl req -in csr.pem -noout -text |
	    grep -A 1 "Subject Alternative Name" | sed 1d | sed "s/^ *//"'
}
check 'a name'        'names DNS:a.example a.example'
check 'two names'     'names "DNS:a.example, DNS:b.a.example" \
    a.example b.a.example'
check 'a wildcard'    'names "DNS:*.a.example" "*.a.example"'
check 'capitals'      'names DNS:a.example A.Example'
check 'IPv4'          'names "IP Address:192.0.2.1" 192.0.2.1'
check 'IPv6'          'names "IP Address:2001:DB8:0:0:0:0:0:1" 2001:db8::1'
check 'all at once'   'names \
    "DNS:a.example, DNS:*.a.example, IP Address:127.0.0.1" \
    a.example "*.a.example" 127.0.0.1'
check 'a hundred names' '
	set --
	while [ $# -lt 100 ]; do set -- "$@" "name-$#.a.example"; done
	"$acme" csr -K ec256.pem "$@" >csr.pem &&
	openssl req -in csr.pem -noout -verify &&
	is 100 "openssl req -in csr.pem -noout -text |
	    grep -o DNS:name | wc -l"'
check 'no common name' '
	"$acme" csr -K ec256.pem a.example >csr.pem &&
	is "subject=" "openssl req -in csr.pem -noout -subject"'
check 'a common name' '
	"$acme" csr -K ec256.pem -N a.example a.example b.example >csr.pem &&
	is "subject=CN = a.example" "openssl req -in csr.pem -noout -subject"'
long=$(head -c 64 /dev/zero | tr '\0' a)
misuse '"$acme" csr -K ec256.pem'
misuse '"$acme" csr -K ec256.pem ""'
misuse '"$acme" csr -K ec256.pem "a b.example"'
misuse '"$acme" csr -K ec256.pem a..example'
misuse '"$acme" csr -K ec256.pem .example'
misuse '"$acme" csr -K ec256.pem "*."'
misuse '"$acme" csr -K ec256.pem "*"'
misuse '"$acme" csr -K ec256.pem "a.*.example"'
misuse '"$acme" csr -K ec256.pem "a.example,b.example"'
misuse '"$acme" csr -K ec256.pem a.example/x'
misuse '"$acme" csr -K ec256.pem a:b'
misuse '"$acme" csr -K ec256.pem "$(printf "a.example\nb")"'
misuse '"$acme" csr -K ec256.pem ä.example'
misuse '"$acme" csr -K ec256.pem "$long.example"'
misuse '"$acme" csr -K ec256.pem \
    "$(head -c 260 /dev/zero | tr "\0" a | sed s/aaaa/aaa./g)example"'

group 'offline: names that are refused'

# wrong NAME WORDS: a name that is none, and what is said of it.
wrong() { dies 64 "'$1' is neither .*address$2" \
    "\"\$acme\" csr -K ec256.pem '$1'"; }
wrong http://a.example "; give the host's name alone"
wrong a.example,b.example '; separate names with spaces'
wrong "$(printf 'b\303\274cher.example')" '; .*xn--.*idn2'
check 'the form that idn2 prints is a name' '
    name=$(LC_ALL=C.UTF-8 idn2 "$(printf "b\303\274cher.example")") &&
    names DNS:xn--bcher-kva.example "$name"'
wrong a-.example ' ('
wrong a.example- ' ('
wrong 192.0.2.256 ' ('
wrong 7 ' ('
n64=$(head -c 64 /dev/zero | tr '\0' n)
check 'a common name of 64 characters' '
	"$acme" csr -K ec256.pem -N "$n64" a.example >csr.pem &&
	openssl req -in csr.pem -noout -subject | grep "$n64"'
dies 64 'at most 64 char' '"$acme" csr -K ec256.pem -N "${n64}n" a.example'
for text in '\214' 'a\nb' '\303\50'; do
	dies 64 'in UTF-8 without control' '"$acme" csr -K ec256.pem \
	    -N "$(printf "$text")" a.example'
done

group 'offline: output files'

# The output where others can write, too, and each keeps what is his.
if [ "$(id -u)" = 0 ]; then
	mkdir sticky && chmod 1777 sticky
	# trap KIND: another user has made it, as sticky/theirs.
	trapped() {
		rm -rf sticky/* plain && echo precious >precious
		(cd sticky && eval "$1 theirs") && chown -h 65534 sticky/theirs
		ls -l sticky >before
	}
	csr_to() { "$acme" csr -T 3 -K ec256.pem -o "$1" a.example; }
	refusal='sticky/theirs belongs to another user, in a directory that'
	for mode in 1777 1775; do
		for kind in 'ln -s ../precious' 'ln -s ../plain' mkfifo \
		    'echo theirs >' 'ln -s /dev/null'; do
			dies 73 "sticky/theirs: $refusal" "chmod $mode sticky
			    trapped '$kind'; csr_to sticky/theirs"
			check 'all is as it was' '
			    ls -l sticky | diff before - && [ ! -e plain ] &&
			    is precious "cat precious"'
		done
	done
	dies 73 "through: sticky/../$refusal" '
	    trapped "ln -s ../precious"
	    ln -s ../sticky/theirs sticky/through; csr_to sticky/through'
	check 'a link of ours, of the directory'\''s owner, or elsewhere' '
	    trapped "ln -s ../precious"; chown -h 0 sticky/theirs
	    csr_to sticky/theirs && grep BEGIN precious &&
	    trapped "ln -s ../precious" && chown 65534 sticky &&
	    csr_to sticky/theirs && grep BEGIN precious &&
	    trapped "ln -s ../precious" && chown 0 sticky &&
	    chmod 777 sticky && csr_to sticky/theirs && grep BEGIN precious &&
	    [ -L sticky/theirs ]'
fi
check '-o /dev/fd/3, where that is a pipe' '
	"$acme" csr -K ec256.pem -o /dev/fd/3 a.example 3>&1 >/dev/null |
	grep BEGIN'

dies 73 "cannot create '': the file name is empty" \
    '"$acme" csr -K ec256.pem -o "" a.example'
dies 73 'cannot create place.sock: No such device or address' '
    socat -u UNIX-LISTEN:place.sock - & await eval "[ -S place.sock ]"
    "$acme" csr -K ec256.pem -o place.sock a.example; got=$?
    kill $!; exit $got'

# mounted WHERE COMMAND...: WHERE/kept is a mount of its own, the file mount.
mounted() {
	rm -rf place && mkdir -p place && seq 9999 >mount && ln -f mount link
	unshare -m sh -c 'if [ "$1" = read-only ]; then
			mount -t tmpfs none place || exit
		fi
		echo old >place/kept && mount --bind mount place/kept || exit
		if [ "$1" = read-only ]; then
			mount -o remount,ro none place || exit
		fi
		shift; "$@"; got=$?; ls -A place; exit $got' sh "$@" >names
	got=$?
	cat names; ls -lA place; return $got
}
for where in writable read-only; do
	check "a mount in a $where directory is written in place" '
		"$acme" csr -K ec256.pem a.example >want &&
		mounted $where "$acme" csr -K ec256.pem -o place/kept \
		    a.example && diff want mount && cmp mount link &&
		is kept "cat names"'
	check "a failure leaves it as it is: $where" '
		mounted $where "$acme" csr -K none.pem -o place/kept a.example
		[ $? = 66 ] && seq 9999 | diff - mount && is kept "cat names"'
done
dies 73 'place/other: Read-only' '
    mounted read-only "$acme" csr -K ec256.pem -o place/other a.example \
	>mounts'
if [ "$(id -u)" = 0 ]; then
	rm -rf sticky && mkdir sticky && chmod 1777 sticky
	for to in /dev/stdout /proc/self/fd/1; do
		dies 73 'another user' ": $to
		    ln -sf $to sticky/out && chown -h 65534 sticky/out
		    \"\$acme\" csr -K ec256.pem -o sticky/out a.example"
	done
	dies 73 'another user' '
	    mkdir sticky/box && chown 65534 sticky/box
	    "$acme" directory -B sticky/box'
	check 'and no request is there' '[ -z "$(ls sticky/box)" ]'
fi

group 'inside: system calls that fail'

cat >faulty.c <<'END'
#define _GNU_SOURCE
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <bearssl.h>
static bool
fault(const char *name)
{
	return getenv("FAULT") && strstr(getenv("FAULT"), name);
}
static int
fail_with(int error)
{
	errno = error;
	return -1;
}
/* The file has one more name then, which shows what becomes of it. */
static int
faulty_linkat(int a, const char *from, int b, const char *to, int flags)
{
	linkat(a, from, AT_FDCWD, "kept", 0);
	if (fault("appears"))
		write(openat(b, to, O_WRONLY | O_CREAT | O_EXCL, 0600), "!", 1);
	if (fault("links fail"))
		return fail_with(EIO);
	return fault("no links") ? fail_with(EPERM) :
	    linkat(a, from, b, to, flags);
}
static int
faulty_renameat(int a, const char *from, int b, const char *to)
{
	return fault("no rename") ? fail_with(EIO) : renameat(a, from, b, to);
}
static int
faulty_unlinkat(int dir, const char *name, int flags)
{
	return fault("no unlink") ? fail_with(EACCES) :
	    unlinkat(dir, name, flags);
}
/* The file systems of Windows have modes of their own. */
static int
faulty_fchmod(int fd, mode_t mode)
{
	if (fault("all is 0755"))
		fchmod(fd, 0755);
	return fault("chmod refused") ? fail_with(EPERM) :
	    fault("all is 0755") ? 0 : fchmod(fd, mode);
}
static int
faulty_fsync(int fd)
{
	struct stat st;

	return fstat(fd, &st) == 0 && fault(S_ISDIR(st.st_mode) ?
	    "no sync" : "no data sync") ? fail_with(EIO) : fsync(fd);
}
static pid_t
faulty_fork(void)
{
	return fault("no fork") ? fail_with(EAGAIN) : fork();
}
static int
faulty_pipe(int fds[2])
{
	return fault("no pipe") ? fail_with(EMFILE) : pipe(fds);
}
static int
faulty_poll(struct pollfd *p, nfds_t n, int ms)
{
	return fault("no poll") ? fail_with(EINVAL) : poll(p, n, ms);
}
static int
faulty_socket(int domain, int type, int protocol)
{
	return fault("no socket") ? fail_with(EMFILE) :
	    socket(domain, type, protocol);
}
static int
faulty_close(int fd)
{
	struct stat st;
	bool file = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size;

	close(fd);
	return fault("no close") && file ? fail_with(EDQUOT) : 0;
}
static int
faulty_ftruncate(int fd, off_t n)
{
	return fault("no truncation") ? fail_with(EIO) : ftruncate(fd, n);
}
static ssize_t
faulty_readlink(const char *name, char *to, size_t n)
{
	return fault("no readlink") ? fail_with(EIO) : readlink(name, to, n);
}
static int
faulty_prlimit(pid_t pid, int what, const struct rlimit *limit, void *old)
{
	return fault("no limits") ? fail_with(EPERM) :
	    prlimit(pid, what, limit, old);
}
static int
faulty_getrlimit(int what, struct rlimit *limit)
{
	return fault("no old limits") ? fail_with(EINVAL) :
	    getrlimit(what, limit);
}
static int
faulty_getentropy(void *p, size_t n)
{
	return fault("no getrandom") ? fail_with(ENOSYS) : getentropy(p, n);
}
#define close faulty_close
#define fchmod faulty_fchmod
#define fork faulty_fork
#define ftruncate faulty_ftruncate
#define getentropy faulty_getentropy
#define getrlimit faulty_getrlimit
#define fsync faulty_fsync
#define linkat faulty_linkat
#define pipe faulty_pipe
#define poll faulty_poll
#define prlimit faulty_prlimit
#define readlink faulty_readlink
#define renameat faulty_renameat
#define socket faulty_socket
#define unlinkat faulty_unlinkat
/* BearSSL makes no key, or no signature but that which tests the key. */
static int signatures;
#define br_ec_keygen(...) \
    (fault("no keygen") ? 0 : br_ec_keygen(__VA_ARGS__))
#define br_rsa_i31_compute_privexp(...) \
    (fault("no exponent") ? 0 : br_rsa_i31_compute_privexp(__VA_ARGS__))
#define br_rsa_i31_pkcs1_sign(...) \
    (fault("no signature") && signatures++ ? 0 : \
	br_rsa_i31_pkcs1_sign(__VA_ARGS__))
#include "acme.c"
END
check 'the program with system calls that fail' \
    '${CC:-cc} -w -I"$src" faulty.c -o faulty -lbearssl'
# faulty FAULTS COMMAND...: with these, in a directory of its own.
faulty() {
	rm -rf faults && mkdir faults && cd faults || return
	FAULT=$1; shift
	export FAULT
	${RUN-} ../faulty "$@"
}
# no_key [FILE]: the key went, overwritten, and there is nothing else.
no_key() {
	cd faults && ls -lA && [ ! -s kept ] && rm kept && is "${1-}" 'ls -A'
}
check 'a key on a file system without hard links' '
    faulty "no links" key -o key.pem && rm kept && is key.pem "ls -A" &&
    openssl pkey -in key.pem -noout -check'
for links in links 'no links'; do
	dies 73 'key.pem: it exists' "faulty '$links, appears' key -o key.pem"
	check "where a file of its name appeared the key goes: $links" '
	    is ! "cat faults/key.pem" && no_key key.pem'
done
dies 74 'cannot rename key.pem' 'faulty "no links, no rename" key -o key.pem'
check 'and a key that cannot be renamed, too' no_key
dies 74 'the key is in key.pem, but its temporary name .acme-step' \
    'faulty "no unlink" key -o key.pem'
check 'the key stays, if it is only its temporary name that stays, too' '
    cd faults && openssl pkey -in key.pem -noout -check &&
    cmp key.pem .acme-step.*'
check 'a kernel without getrandom: /dev/urandom, and each key is another' '
    faulty "no getrandom" key -o key.pem && mv key.pem ../first.key &&
    openssl pkey -in ../first.key -noout -check && cd .. &&
    faulty "no getrandom" key -o key.pem && ! cmp key.pem ../first.key'
dies 70 'cannot get random bytes from the system' ': > urandom
    faulty "" key -o key.pem && FAULT="no getrandom" unshare -m sh -c "
	mount --bind ../urandom /dev/urandom && ${RUN-} ../faulty key -o k"'
dies 70 'cannot get random bytes from the system' '
    faulty "" key -o key.pem && FAULT="no getrandom" unshare -m sh -c "
	mount -t tmpfs none /dev && ${RUN-} ../faulty key -o k"'
check 'chmod refused: a key whose mode is right already' '
    faulty "chmod refused" key -o key.pem && is 600 "stat -c %a key.pem"'
for how in 'chmod refused, all is 0755' 'all is 0755'; do
	dies 73 'key.pem: its file system would let others read the key' \
	    "faulty '$how' key -o key.pem"
	check "there is no key that others could read: $how" '
	    is "" "ls -A faults"'
done
# replaced FAULTS MODE: what replaces a file that has this mode.
replaced() {
	faulty '' key -o key.pem && rm kept && echo old >out &&
	chmod "$2" out &&
	FAULT=$1 ${RUN-} ../faulty csr -K key.pem -o out a.example
}
check 'chmod refused: a file is replaced, unless more can read it then' '
    replaced "chmod refused" 644 && grep BEGIN out && cd .. &&
    replaced "chmod refused, all is 0755" 755 && grep BEGIN out && cd .. &&
    replaced "chmod refused, all is 0755" 644 && grep BEGIN out'
dies 73 'out: its file system does not keep the mode' \
    'replaced "chmod refused" 600'
check 'and the old file stays' 'is old "cat faults/out" &&
    ! ls -A faults | grep -F .acme-step'
dies 74 'cannot rename out' 'replaced "no rename" 644'
dies 74 'cannot sync out' 'replaced "no data sync" 644'
dies 74 'cannot close out' 'replaced "no close" 644'
check 'and the old file stays' 'is old "cat faults/out" &&
    ! ls -A faults | grep -F .acme-step'
for what in sync close; do
	case $what in
	sync)	fault='no data sync' ;;
	*)	fault='no close' ;;
	esac
	dies 74 "cannot $what key.pem" 'faulty "$fault" key -o key.pem'
	check 'and no key stays' 'is "" "ls -A faults"'
done
check 'a key that cannot be overwritten: a warning, and it is removed' '
    faulty "no links, appears, no truncation" key -o key.pem 2>err; got=$?
    cat ../err; [ $got = 73 ] && is ! "cat key.pem" && not grep PRIVATE kept &&
    rm kept && is key.pem "ls -A" &&
    grep "^acme-step: key: cannot overwrite the key in .acme-step" ../err'
dies 73 'cannot create link: ' '
    faulty "" key -o key.pem && rm kept && ln -s out link &&
    FAULT="no readlink" ${RUN-} ../faulty csr -K key.pem -o link a.example'
for fault in 'no limits' 'no old limits'; do
	dies 70 'cannot forbid core files' 'faulty "$fault" version'
done
dies 70 'cannot make a key' 'faulty "no keygen" key -o key.pem'
dies 70 'cannot make a key' \
    'faulty "no exponent" key -t rsa2048 -o key.pem'
check 'no key is there then' 'is "" "ls -A faults"'
chmod 600 rfc7638.pem
dies 70 'cannot sign' 'FAULT="no signature" ${RUN-} ./faulty csr \
    -K rfc7638.pem -o signed.csr a.example'
check 'and no CSR' '[ ! -e signed.csr ]'
check 'a directory that cannot be synced: a warning' '
    faulty "no sync" key -o key.pem 2>err; got=$?; cat ../err
    [ $got = 0 ] && [ -s key.pem ] && is 1 "wc -l <../err" &&
    grep "^acme-step: .*: warning: cannot sync .* of key.pem" ../err'

group 'inside: the built-in roots'

cat >roots.c <<'END'
#define main acme_main
#include "acme.c"
#undef main
static void
show(const char *what, const unsigned char *p, size_t n)
{
	printf("%s ", what);
	while (n-- > 0)
		printf("%02x", *p++);
	printf("\n");
}
int
main(void)
{
	built_in_anchors();
	for (size_t i = 0; i < nanchor; i++) {
		const br_x509_trust_anchor *a = &anchor[i];

		show("name", a->dn.data, a->dn.len);
		if (a->pkey.key_type == BR_KEYTYPE_RSA) {
			show("n", a->pkey.key.rsa.n, a->pkey.key.rsa.nlen);
			show("e", a->pkey.key.rsa.e, a->pkey.key.rsa.elen);
		} else
			show("q", a->pkey.key.ec.q, a->pkey.key.ec.qlen);
	}
	return 0;
}
END
# The fingerprints are those that Let's Encrypt publishes.
check 'the built-in roots are those of ca-certificates, by fingerprint' '
	dir=/etc/ssl/certs
	for root in X1:96BCEC06264976F37460779ACF28C5A7CFE8A3C0AAE11A8FFCEE05C0\
BDDF08C6 X2:69729B8E15A86EFC177A57AFB7171DFC64ADD28C2FCA8CF1507E34453CCB1470
	do
		file=$dir/ISRG_Root_${root%:*}.pem
		openssl x509 -in "$file" -noout -fingerprint -sha256 |
		    tr -d : | grep "=${root#*:}$" || exit
		openssl x509 -in "$file" -outform DER -out root.der
		openssl asn1parse -inform DER -in root.der -strparse \
		    "$(openssl asn1parse -inform DER -in root.der |
		    awk -F: "/cons: SEQUENCE/ && /d=2/ && ++n == 2 {
			print \$1 + 0 }")" -noout -out name.der
		echo "name $(xxd -p name.der | tr -d "\n")"
		openssl x509 -in "$file" -noout -pubkey | openssl pkey -pubin \
		    -outform DER -out pub.der
		case ${root%:*} in
		X1)	echo "n $(openssl x509 -in "$file" -noout -modulus |
			    cut -d= -f2 | tr A-F a-f)"
			echo "e 010001" ;;
		*)	echo "q $(tail -c 97 pub.der | xxd -p | tr -d "\n")" ;;
		esac
	done >want; cat want
	${CC:-cc} -w -I"$src" roots.c -o roots -lbearssl &&
	${RUN-} ./roots >got &&
	grep -v "^subject\|ingerprint" want | diff - got'

group 'offline: is it time to renew?'

# certificate FILE FROM TO NAMES [KEY]: with these dates, self-signed.
certificate() {
	printf '%s\n' "subjectAltName=$4" >extension
	openssl req -new -key "${5:-ec256.pem}" -subj /CN=due -out req.pem
	: >due.index
	openssl ca -batch -notext -config due.cnf -extfile extension -selfsign \
	    -keyfile "${5:-ec256.pem}" -in req.pem -out "$1" \
	    -startdate "$(date -u -d "$2" +%Y%m%d%H%M%SZ)" \
	    -enddate "$(date -u -d "$3" +%Y%m%d%H%M%SZ)" 2>/dev/null
}
cat >due.cnf <<'END'
[ca]
default_ca = ca
[ca]
database = due.index
new_certs_dir = .
rand_serial = yes
default_md = sha256
policy = policy
[policy]
commonName = optional
END
# due STATUS WORDS ARGUMENT...: it answers so, in one line on its output.
due() {
	status=$1 words=$2; shift 2
	check "due $*: $words" "\"\$acme\" due $* >out 2>err; got=\$?
	    cat out err; [ \$got = $status ] && [ ! -s err ] &&
	    [ \"\$(grep -c '' out)\" = 1 ] && grep -q -e '$words' out"
}
two='DNS:a.example,DNS:b.example'
certificate new.pem '10 days ago' '80 days' $two
certificate third.pem '61 days ago' '29 days' $two
certificate almost.pem '59 days ago' '31 days' $two
certificate old.pem '91 days ago' '1 day ago' $two
certificate future.pem '1 day' '90 days' $two
certificate half.pem '4 days ago' '3 days' $two
certificate young.pem '3 days ago' '4 days' $two
certificate mixed.pem '1 day ago' '89 days' DNS:a.example,IP:192.0.2.1
cp ec256.pem due.key
: >junk.key && chmod 600 junk.key
due 1 'not due: new.pem' new.pem
due 1 'not due' new.pem a.example b.example
due 1 'not due' new.pem B.Example a.example. a.example
due 1 'not due' -K due.key new.pem
due 1 'not due' mixed.pem 192.0.2.1 a.example
due 0 '^due: third.pem' third.pem
due 1 'not due' almost.pem
due 0 'expired' old.pem
due 0 '^due' half.pem
due 1 'not due' young.pem
due 1 'not valid before.*clock' future.pem
due 0 'missing' none.pem
due 0 'missing' nowhere/none.pem
due 0 'missing' new.pem/none.pem
due 0 'empty' /dev/null
due 0 'not a certificate' ec256.pem
due 0 'not a certificate' nonsense.pem
due 0 'has b.example, which is not asked for$' new.pem a.example
due 0 'lacks c.example$' new.pem a.example b.example c.example
due 0 'has 192.0.2.1, which' mixed.pem a.example
due 0 'does not match the key ec384' -K ec384.pem new.pem
head -c 300 new.pem >cut.pem
due 0 'not a certificate' cut.pem
openssl x509 -in new.pem -outform DER -out new.der
due 1 'not due' new.der a.example b.example
# a.example, and then: a name that ends too late; ESC [31m and marks of
# direction in a name; a second list.
a=82:09:61:2e:65:78:61:6d:70:6c:65
certificate late.pem '1 day ago' '89 days' "DER:30:0e:$a:82:05:61"
certificate marks.pem '1 day ago' '89 days' "DER:30:1c:$a:82:0f:\
61:1b:5b:33:31:6d:e2:80:8e:e2:80:8f:d8:9c:62"
certificate lists.pem '1 day ago' '89 days' "DNS:b.example
2.5.29.99=DER:30:0b:$a"
openssl x509 -in lists.pem -outform DER | xxd -p | tr -d '\n' |
    sed s/0603551d63/0603551d11/ | xxd -r -p |
    openssl x509 -inform DER -out lists.pem
due 0 'lacks a.example$' late.pem a.example
due 0 'lacks a.example$' lists.pem a.example
due 0 'has a?.31m????????b, which' marks.pem a.example
due 0 '^due: a?.31m????????b is missing' \
    '"$(printf "a\033[31m\342\200\216\342\200\217\330\234b")"'
dies 1 'a????????b' \
    'echo {} | "$acme" json "$(printf "a\342\200\216\342\200\217\330\234b")"'
# odd KIND FILE: as an editor or another system leaves it.
odd() {
	case $1 in
	*mark*)	printf '\357\273\277' ;;
	esac
	case $1 in
	*white*)	sed "s/-----\$/&$(printf ' \t \r')/" "$2" ;;
	*indented*)	sed 's/^/  /' "$2" ;;
	*Macintosh*)	tr '\n' '\r' <"$2" ;;
	*)		cat "$2" ;;
	esac
}
for kind in 'with a byte order mark' 'with white space' \
    'with a mark and white space' indented 'of an old Macintosh'; do
	check "a key and a certificate $kind" '
		umask 077
		odd "$kind" due.key >odd.key && odd "$kind" new.pem >odd.pem
		"$acme" due -K odd.key odd.pem a.example b.example
		[ $? = 1 ]'
	check "the first of two certificates is seen: $kind" '
		{ odd "$kind" new.pem; echo; cat old.pem; } >two.pem
		"$acme" due two.pem; [ $? = 1 ]'
done
sed 's/END CERT/END X509 CERT/' new.pem >ends.pem
due 0 'not a certificate' ends.pem
printf %s "$(cat new.pem)" | head -c -9 >ends.pem
due 0 'not a certificate' ends.pem
sed 's/END PRIV/END RSA PRIV/' due.key >junk2.key && chmod 600 junk2.key
dies 65 'malformed PEM' '"$acme" due -K junk2.key new.pem'
check 'JSON with a byte order mark' '
	printf "\357\273\277{\"a\": 1}" >marked
	is 1 "\"\$acme\" json a marked"'
check 'due reads standard input' '
    "$acme" due - <new.pem >out; [ $? = 1 ] && grep "standard input" out'
dies 66 none.pem '"$acme" due -K none.pem new.pem'
dies 65 junk.key '"$acme" due -K junk.key new.pem'
misuse '"$acme" due'
misuse '"$acme" due new.pem "a b"'
dies 66 . '"$acme" due .'
dies 74 . '"$acme" due new.pem >/dev/full'
cp "$acme" step.bin
cp new.pem secret.pem
chmod 000 secret.pem
chmod 755 "$tmp" . step.bin
dies 66 secret.pem 'setpriv --reuid=65534 --regid=65534 --clear-groups \
    ./step.bin due secret.pem'
rm -f step.bin

group 'offline: the command line'

misuse '"$acme"'
misuse '"$acme" nonsense'
misuse '"$acme" key'
misuse '"$acme" key -o'
misuse '"$acme" key -t dsa -o none.pem'
misuse '"$acme" key -Z -o none.pem'
misuse '"$acme" key -o none.pem none'
misuse '"$acme" csr a.example'
misuse '"$acme" thumbprint none none'
misuse '"$acme" json'
misuse '"$acme" json . /dev/null none'
misuse '"$acme" get'
misuse '"$acme" get https://localhost/ https://localhost/'
misuse '"$acme" new-order -T 5'
misuse '"$acme" directory none'
for seconds in 0 -1 x '' 5x 99999999999999999999; do
	misuse "\"\$acme\" directory -T '$seconds'"
done
misuse 'ACME_TIMEOUT=x "$acme" directory'
misuse '"$acme" directory -d http://localhost/'
misuse '"$acme" directory -d nonsense'
misuse '"$acme" directory -d "https://localhost:$(printf %0900d 443)/"'
misuse '"$acme" directory -d https://-proxy/'
misuse '"$acme" directory -d "https://[none]/"'
dies 64 'dsa; there are ec256 ec384 rsa2048 rsa3072 rsa4096 (' \
    '"$acme" key -t dsa -o none.pem'
for option in -h --help '-o none.pem -h'; do
	check "key $option prints the help" "\"\$acme\" key $option >out &&
	    \"\$acme\" help key | diff - out"
done
dies 64 '-v comes before the command; options go after' '"$acme" -v directory'
dies 64 'no such option: --staging (' '"$acme" --staging directory'
dies 64 'no such option: --foo; options have one letter' '"$acme" key --foo'
dies 64 'key: option -o FILE is required (see acme-step help key)' \
    '"$acme" key -t ec384'
dies 64 'csr: option -K KEY is required' '"$acme" csr -N none a.example'
dies 64 'key: option -o needs a value' '"$acme" key -o'
dies 64 ': -4 and -6 cannot be combined' '"$acme" directory -4 -6'
dies 64 'keys are not written to standard output; use -o FILE' \
    '"$acme" key -o -'
dies 64 'trust anchors cannot come from standard input; use -C FILE' \
    '"$acme" directory -d https://ca.invalid/ -C - <ec256.pem'
dies 64 "'-N' is neither .*; options go before names" \
    '"$acme" csr -K ec256.pem a.example -N'
check '-- ends the options' '"$acme" csr -K ec256.pem -- a.example >csr.pem &&
    names DNS:a.example a.example'
check 'a refused command line makes no file' '[ ! -e none.pem ]'

# clogged FD COMMAND...: run it where this descriptor is a full pipe.
mkfifo full.pipe
clogged() {
	(
		fd=$1; shift
		exec 7<>full.pipe
		dd if=/dev/zero of=full.pipe bs=4096 oflag=nonblock 2>dd.err
		eval "exec sh -c 'echo \$\$ >stuck.pid
		    exec \"\$@\"' sh \"\$@\" $fd>&7"
	)
}
check 'a step that cannot write its message ends, with its own status' '
	clogged 2 timeout -s KILL 20 "$acme" nonsense; got=$?
	echo "$got"; [ "$got" = 64 ] &&
	{ clogged 2 timeout -s KILL 20 "$acme" thumbprint -k none.pem; got=$?
	echo "$got"; [ "$got" = 66 ]; }'
"$acme" key -o stuck.key
check 'and the next step is told' '
	clogged 2 timeout -s KILL 20 "$acme" order -k stuck.key </dev/null |
	cat >piped
	cat piped; grep "^failed 65 order " piped'
check 'nor does a next step that does not read hold it up' '
	echo "failed 75 new-order some words" >piped
	clogged 1 timeout -s KILL 20 "$acme" order -k stuck.key <piped; got=$?
	echo "$got"; [ "$got" = 75 ]'

group 'offline: help'

# commands: the names of all, as help lists them.
commands() {
	"$acme" help | sed -n 's/^  \([a-z-]*\)   *.*/\1/p' | sort
}

# synopses: the command lines of all.
synopses() {
	commands | while read -r command; do
		"$acme" help "$command" | sed 1q
	done | sort
}
commands >all-commands
check 'help lists all commands' '
    sed -n "s/^{ \.name = \"\([^\"]*\)\".*/\1/p" "$src/acme.c" | sort >a &&
    [ -s a ] && diff a all-commands'
check '-h and --help do the same' '
    "$acme" help >a && grep -c . a && "$acme" -h | diff a - &&
    "$acme" --help | diff a -'
check 'help fits on two screens' '
    "$acme" help | awk "END { print NR; exit NR > 48 }"'
check 'its exit statuses are those of the code' '
    sed -n "/^enum/,/^}/s/^[ \t]*[A-Z_]* *= \(0\|1\|[67][0-9]\),.*/\1/p" \
	"$src/acme.c" | sort -u >a && [ "$(grep -c . a)" -gt 10 ] &&
    "$acme" help | sed -n "/^Exit status:/,/^$/p" |
    grep -o "[0-9][0-9]*" | sort | diff a -'
check 'without arguments: a short usage, and what a certificate takes' '
    "$acme" >out 2>err; got=$?
    cat out err; [ "$got" = 64 ] && [ ! -s out ] &&
    [ "$(grep -c . err)" = 3 ] && grep "^usage: acme-step COMMAND" err &&
    grep "no command given (see acme-step help)" err &&
    grep "key, new-account, new-order, respond, finalize" err'
check 'with standard error full too' '
    clogged 2 timeout -s KILL 20 "$acme"; got=$?
    echo "$got"; [ "$got" = 64 ]'

# Each option that its help lists is one that it accepts.
accepted() {
	grep -o '^  -[^ ].\{15\}' help >listed
	while read -r option value; do
		"$acme" "$1" "$option" ${value:+a:1:127.0.0.1} -h >out &&
		diff help out || return
	done <listed
}
while read -r command; do
	check "help $command, $command -h and $command --help" '
	    "$acme" help $command >help 2>err && [ ! -s err ] &&
	    [ "$(grep -c . help)" -gt 3 ] &&
	    sed 1q help | grep -e "^acme-step $command\( \|\$\)" &&
	    "$acme" $command -h | diff help - &&
	    "$acme" $command --help | diff help - &&
	    not grep ".\{81\}" help && not grep "%" help &&
	    accepted $command'
	check "the options of $command are those of its synopsis" '
	    sed 1q help | grep -o "[ ([]-[A-Za-z0-9]\( [A-Z]*\)\?" |
	    sed "s/^.//;s/ $//" | sort >a
	    sed -n "/^options:/,/^$/s/^  \(-. *[A-Z]*\) .*/\1/p" help |
	    sed "s/ *$//" | sort | diff a -'
done <all-commands
for command in key csr thumbprint due json help version; do
	check "$command has no network: its help has no option for one" '
	    "$acme" help $command | not grep "^  -[daCHPB46v] "'
done
check 'send has no account, nor a directory' '
    "$acme" help send >help && grep "^  -C" help && not grep "^  -[dkaB]" help'
dies 64 '^acme-step: no such command: orders (see acme-step help)$' \
    '"$acme" help orders'
check 'what the value of an option can be' '
    "$acme" help key | grep "ec256 ec384 rsa2048 rsa3072 rsa4096" &&
    "$acme" help respond | grep "http-01 dns-01 tls-alpn-01" &&
    "$acme" help respond | grep "dehydrated uacme lego certbot"'

# libraries: those of the program.  The one for another processor is static.
libraries() {
	libc=musl later=
	! readelf -dW "$acme" 2>/dev/null | grep -q 'NEEDED.*libc\.so\.6' ||
	    libc=glibc
	! grep -rq 'define BR_FEATURE' /usr/include/bearssl || later='after '
	echo "BearSSL ${later}0.6, $libc"
}
check 'version names BearSSL and libc, too' '
    is "acme-step $(version) ($(libraries))" \""$acme"\" version &&
    "$acme" version >a && "$acme" --version | diff a -'

[ "$task" != offline ] || finish

group 'the canned server'

# issue NAME ISSUER EXTENSION [OPTION...]: NAME.pem and NAME.key, by
# openssl ca, which alone can choose the dates.
cat >ca.cnf <<'END'
[ca]
default_ca = ca
[ca]
database = index
new_certs_dir = .
rand_serial = yes
default_md = sha256
policy = policy
unique_subject = no
[policy]
commonName = optional
END
: >index
issue() {
	subject=$1 issuer=$2
	printf '%s\n' "$3" >extension
	shift 3
	[ -e "$subject.key" ] || openssl genpkey -algorithm EC \
	    -pkeyopt ec_paramgen_curve:P-256 -out "$subject.key"
	openssl req -new -key "$subject.key" -subj "/CN=$subject" -out req.pem
	openssl ca -batch -notext -config ca.cnf -extfile extension \
	    -cert "$issuer.pem" -keyfile "$issuer.key" -in req.pem \
	    -out "$subject.pem" -days 30 "$@" 2>/dev/null
}
# root NAME [OPTION...]
root() {
	name=$1; shift
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
	    -subj "/CN=$name" -keyout "$name.key" -out "$name.pem" "$@" \
	    2>/dev/null
}
root root
root stranger
issue middle root 'basicConstraints=critical,CA:TRUE'
here=subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1
issue server root "$here"

# serve.sh: the Nth request for /x gets the file METHOD_x.N, else METHOD_x,
# as it is; one that can be executed is run.  Then it hangs up where there
# is METHOD_x.close, without the farewell of TLS where there is .drop.
cat >serve.sh <<'END'
cr=$(printf '\r')
cd www || exit
echo connected >>connections
while read -r method path rest; do
	name=${method}_${path##*/}
	echo "$name" >>requests
	n=$(grep -cxe "$name" requests)
	length=0
	: >"head.$name.$n"
	while IFS= read -r line; do
		line=${line%"$cr"}
		[ "$line" ] || break
		echo "$line" >>"head.$name.$n"
		case $line in
		[Cc]ontent-[Ll]ength:*) length=${line##* } ;;
		esac
	done
	head -c "$length" >"body.$name.$n"
	reply=$name.$n
	[ -e "$reply" ] || reply=$name
	if [ -x "$reply" ]; then
		. "./$reply"
	elif [ -e "$reply" ]; then
		cat "$reply"
	else
		printf 'HTTP/1.1 404 Not Found\r\n'
		printf 'Content-Length: 5\r\n\r\nnone\n'
	fi
	[ ! -e "$reply.close" ] || exit 0
	[ ! -e "$reply.drop" ] || { sleep 0.1; kill -9 "$PPID"; }
done
END

# serve CERTIFICATE [OPTION]: start the canned server on $port.
serve() {
	port=$(free_port)
	server_start socat "OPENSSL-LISTEN:$port,bind=127.0.0.1,fork,\
reuseaddr,verify=0,cert=$1.pem,key=${1%-chain}.key${2+,$2}" \
	    'EXEC:sh serve.sh' 2>/dev/null
	up "$port"
}
serve server
home=$port
ca=https://localhost:$home

# raw NAME FORMAT: a reply, in the words of printf.
raw() {
	rm -f "www/$1"
	# shellcheck disable=SC2059
	printf "$2" >"www/$1"
}
closing() { raw "$@"; : >"www/$1.close"; }
drop() { raw "$@"; : >"www/$1.drop"; }
# runs NAME CODE: a reply that a shell makes.
runs() { echo "$2" >"www/$1"; chmod +x "www/$1"; }
# answer NAME STATUS BODY [HEADER...]: a reply without a fault in HTTP.
answer() {
	file=www/$1 status=$2 body=$3
	shift 3
	rm -f "$file"
	{
		printf 'HTTP/1.1 %s\r\n' "$status" 'Replay-Nonce: fresh_nonce' \
		    "$@" | sed '2,$s/^HTTP.1.1 //'
		printf 'Content-Length: %s\r\n\r\n%s' \
		    "$(printf %s "$body" | wc -c)" "$body"
	} >"$file"
}
# fresh: forget all replies and requests, but for the usual ones.
endpoint() { printf '"new%s":"%s/new%s"' "$1" "$ca" "$1"; }
directory="{$(endpoint Nonce),$(endpoint Account),$(endpoint Order),\
\"revokeCert\":\"$ca/revoke\",\"keyChange\":\"$ca/change\"}"
fresh() {
	rm -rf www
	mkdir www
	answer GET_dir '200 OK' "$directory" 'Content-Type: application/json'
	raw HEAD_newNonce 'HTTP/1.1 200 OK\r\nReplay-Nonce: n0\r\n\r\n'
}

# step COMMAND...: with the key, the anchor, the account and a limit.
umask 077
"$acme" key -o account.key
"$acme" key -o leaf.key
umask 022
cat >account <<END
directory $ca/dir
new-nonce $ca/newNonce
account $ca/account/1?x=y
nonce from_the_record
end
END
cat >record <<END
$(sed '$d' account)
order $ca/order
status ready
expires 2030-01-01T00:00:00Z
identifier dns a.example
authorization $ca/authz
finalize $ca/finalize
end
END
step() {
	command=$1; shift
	"$acme" "$command" -C root.pem -k account.key -T 5 "$@"
}
get() { step get -a account "$ca/$1"; }

# later NAME CODE...: run it in the background; replay it after a wait.
jobs=''
later() {
	job=$1; shift
	(
		start=$(date +%s)
		(eval "$*") >"$job.out" 2>"$job.err"
		echo $? >"$job.status"
		echo $(($(date +%s) - start)) >"$job.seconds"
	) &
	jobs="$jobs $!"
}
settle() {
	for pid in $jobs; do
		wait "$pid"
	done
	jobs=''
}
replay() {
	cat "$1.out"
	cat "$1.err" >&2
	return "$(cat "$1.status")"
}
# within JOB MIN MAX: it took so many seconds; the sanitizers may take twice.
within() {
	most=$3
	case $acme in *-san) most=$(($3 * 2)) ;; esac
	check "$1 took $2 to $3 s" "s=\$(cat $1.seconds); echo \"\$s\"
	    [ \$s -ge $2 ] && [ \$s -le $most ]"
}

fresh
raw POST_it 'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello'
check 'a reply is printed as it came' 'is hello "get it"'

group 'TLS'

# One directory for every server, whatever its origin.
fresh
answer GET_dir '200 OK' "$(printf %s "$directory" | sed "s|$ca||g")"
check 'the name'     'step directory -d "$ca/dir"'
check 'IPv4 address' 'step directory -d "https://127.0.0.1:$home/dir"'
check '-4'           'step directory -4 -d "https://127.0.0.1:$home/dir"'
dies 69 . 'step directory -6 -d "https://127.0.0.1:$home/dir"'
port=$(free_port)
server_start socat "OPENSSL-LISTEN:$port,pf=ip6,bind=[::1],fork,\
reuseaddr,verify=0,cert=server.pem,key=server.key" 'EXEC:sh serve.sh' \
    2>/dev/null
up "$port"
check 'IPv6 address' 'step directory -d "https://[::1]:$port/dir"'
dies 69 . 'step directory -4 -d "https://[::1]:$port/dir"'
check 'IPv6 address with -6' 'step directory -6 -d "https://[::1]:$port/dir"'
check 'the host of an IPv6 address is in brackets' \
    'grep -ix "host: \[::1\]:$port" www/head.GET_dir.*'

# with_clock NAME CODE: the program, with functions of libc as in the code.
with_clock() {
	{ printf '%s\n' '#include <errno.h>' '#include <time.h>' "$2" \
	    '#include "acme.c"'; } >"$1.c" &&
	cc -w -D_GNU_SOURCE -I"$src" -o "$1" "$1.c" -lbearssl
}
# BearSSL's own clock ends in 2038 in the builds for i386 and armhf.
check 'BearSSL takes the time of the step' '
    with_clock old-clock "time_t time(time_t *t) { return 0; }" &&
    acme=$PWD/old-clock step directory -d "$ca/dir"'
check 'a system that refuses to tell the time' '
    with_clock no-clock "int clock_gettime(clockid_t id,
	struct timespec *t) { errno = EPERM; return -1; }"'
dies 70 'cannot read the clock: Operation not permitted' \
    'acme=$PWD/no-clock step directory -d "$ca/dir"'

group 'TLS: servers of all kinds'

# A server for each fault, and the word that our message has for it.
openssl genrsa -out rsa-server.key 2048 2>/dev/null
openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 \
    -out p384.key
issue rsa-server root "$here"
issue p384 root "$here"
issue star root 'subjectAltName=DNS:*.localhost'
issue capital root 'subjectAltName=DNS:LOCALHOST'
issue deep middle "$here"
cat deep.pem middle.pem >deep-chain.pem
for name in rsa-server p384 deep-chain capital; do
	serve "$name"
	check "$name" "step directory -d https://localhost:$port/dir"
done
# serve_only CERTIFICATE OPTION...: a server, with TLS 1.2, that answers
# each request with the directory, on $port.
serve_only() {
	port=$(free_port) cert=$1; shift
	ln -sf www/GET_dir dir
	server_start openssl s_server -HTTP -quiet -tls1_2 \
	    -accept "127.0.0.1:$port" -cert "$cert.pem" -key "$cert.key" "$@"
	up "$port"
}
while read -r name option; do
	# shellcheck disable=SC2086	# several words
	serve_only "$name" $option
	check "$name: a server with $option alone" '
	    step directory -d "https://localhost:$port/dir" | grep new-nonce'
done <<'END'
server -groups X25519
server -groups P-256
server -groups P-384
server -groups P-521
server -cipher ECDHE-ECDSA-AES128-GCM-SHA256
server -cipher ECDHE-ECDSA-AES256-GCM-SHA384
server -cipher ECDHE-ECDSA-CHACHA20-POLY1305
rsa-server -cipher ECDHE-RSA-AES128-GCM-SHA256
rsa-server -cipher ECDHE-RSA-AES256-GCM-SHA384
rsa-server -cipher ECDHE-RSA-CHACHA20-POLY1305
END
serve_only server -cipher ECDHE-ECDSA-AES128-SHA256
dies 69 cipher 'step directory -d "https://localhost:$port/dir"'
issue expired root "$here" -startdate 20200101000000Z \
    -enddate 20210101000000Z
issue future root "$here" -startdate 20480101000000Z \
    -enddate 20490101000000Z
issue other root subjectAltName=DNS:other.example,DNS:localhost.other.example
issue nameless root subjectAltName=DNS:localhost
issue mail root 'subjectAltName=DNS:localhost,email:ip 127.0.0.1'
issue strange stranger "$here"
issue pretender root "$here,DNS:x" # an end entity that issues
issue forged pretender "$here"
cat forged.pem pretender.pem >forged-chain.pem
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
    -subj /CN=localhost -addext "$here" -keyout self.key -out self.pem \
    2>/dev/null
while read -r name words; do
	serve "$name"
	dies 78 "$words" \
	    ": $name; step directory -d https://localhost:$port/dir"
done <<'END'
expired expired at 2021-01-01T00:00:00Z (the clock here shows
future not valid before 2048-01-01T00:00:00Z (the clock here shows
other for another name
star for another name
self does not chain to a trust anchor in .*root.pem; see -C
strange does not chain to a trust anchor
deep does not chain to a trust anchor
forged-chain was issued by a certificate that is not a CA's
END
for name in nameless mail; do
	serve "$name"
	dies 78 127.0.0.1 ": $name
	    step directory -d https://127.0.0.1:$port/dir"
done
dies 78 . 'step directory -C stranger.pem -d "$ca/dir"'

group 'TLS: certificates'

# offer CERTIFICATE: a server, in place of the last one that was offered.
offered=''
offer() {
	[ -z "$offered" ] || { kill "$offered"; pids=${pids% *}; }
	serve "$1"
	offered=$!
}
# accepts NAME [OPTION...], unfit NAME WORDS [OPTION...]: what is offered.
accepts() {
	case_of=$1; shift
	check "accepts $case_of $*" \
	    "step directory -d https://localhost:$port/dir $*"
}
unfit() {
	case_of=$1 words=$2; shift 2
	dies 78 "$words" \
	    ": $case_of; step directory -d https://localhost:$port/dir $*"
}

# tlv TAG VALUE: an element of DER, in hexadecimal.
tlv() {
	len=$((${#2} / 2))
	if [ $len -lt 128 ]; then
		printf '%s%02x%s' "$1" $len "$2"
	else
		printf '%s82%04x%s' "$1" $len "$2"
	fi
}
# edited NAME SED-SCRIPT: its certificate, by root, with the hexadecimal of
# what is signed changed, and signed again.
edited() {
	openssl x509 -in "$1.pem" -outform DER -out edited.der
	openssl asn1parse -inform DER -in edited.der -strparse 4 -noout \
	    -out edited.tbs
	tbs=$(xxd -p edited.tbs | tr -d '\n' | sed "$2")
	sig=$(echo "$tbs" | xxd -r -p |
	    openssl dgst -sha256 -sign root.key | xxd -p | tr -d '\n')
	tlv 30 "$tbs$(tlv 30 06082a8648ce3d040302)$(tlv 03 "00$sig")" |
	xxd -r -p | openssl x509 -inform DER -out "$1.pem"
}
issuing=basicConstraints=critical,CA:TRUE
two='1.2.3.4=DER:05:00
1.2.3.5=DER:05:00'
issue localhost root keyUsage=digitalSignature
issue old root "$here"
edited old s/a003020102/a003020100/
issue twice root "$here
$two"
issue short-address root \
    subjectAltName=DER:30:10:82:09:6c:6f:63:61:6c:68:6f:73:74:87:03:7f:00:01
issue client root "$here
extendedKeyUsage=clientAuth,emailProtection"
issue any root "$here
extendedKeyUsage=anyExtendedKeyUsage"
issue both root "$here
extendedKeyUsage=clientAuth,serverAuth"
issue authority root "$here
$issuing"
issue mail-ca root "$issuing
extendedKeyUsage=emailProtection"
issue tls-ca root "$issuing
extendedKeyUsage=serverAuth"
issue twice-ca root "$issuing
$two"
for name in twice twice-ca; do
	edited "$name" s/06032a0305/06032a0304/
done
for name in mail-ca tls-ca twice-ca; do
	issue "by-$name" "$name" "$here"
	cat "by-$name.pem" "$name.pem" >"by-$name-chain.pem"
done
while read -r name words; do
	offer "$name"
	case $words in
	good)	accepts "$name" ;;
	*)	unfit "$name" "$words" ;;
	esac
done <<'END'
localhost its certificate has no subjectAltName
old its certificate is not X.509 version 3
twice its certificate has an extension twice
short-address its certificate has a malformed subjectAltName
client its certificate is not for TLS servers
any its certificate is not for TLS servers
both good
authority its certificate is a CA certificate
by-mail-ca-chain a CA certificate in its chain is not for TLS servers
by-tls-ca-chain good
by-twice-ca-chain a CA certificate in its chain has an extension twice
END
unfit 'by-twice-ca-chain' 'not chain to a trust anchor' -C twice-ca.pem
offer self
accepts 'a self-signed CA certificate' -C self.pem
offer server
accepts 'the server certificate itself' -C server.pem
offer star
check 'accepts a wildcard' '
	step directory -H "a.localhost:$port:127.0.0.1" \
	    -d "https://a.localhost:$port/dir"'

group 'TLS: name constraints'

# constrained NAME CONSTRAINTS NAMES: by a CA of its own, under root.
constrained() {
	issue "$1-ca" root "$issuing
nameConstraints=$2"
	issue "$1" "$1-ca" "subjectAltName=$3"
	cat "$1.pem" "$1-ca.pem" >"$1-chain.pem"
	offer "$1-chain"
}
# The constraints are those of a CA between, and then of the anchor.
while read -r name constraints names words; do
	constrained "$name" "$constraints" "$names"
	for anchor in root "$name-ca"; do
		case $words in
		good)	accepts "$name" -C "$anchor.pem" ;;
		*)	unfit "$name" "$words" -C "$anchor.pem" ;;
		esac
	done
done <<'END'
dns-in permitted;DNS:localhost DNS:localhost,DNS:*.localhost good
dns-out permitted;DNS:a.example DNS:localhost constraints.*: dns localhost
dns-one-out permitted;DNS:localhost DNS:localhost,DNS:b.example : dns b.example
dns-excluded excluded;DNS:LocalHost DNS:localhost constraints.*: dns localhost
dns-wild excluded;DNS:a.localhost DNS:localhost,DNS:*.localhost : dns \*.local
dns-other excluded;DNS:a.example DNS:localhost,IP:127.0.0.1 good
ip-in permitted;IP:127.0.0.0/255.0.0.0 DNS:localhost,IP:127.0.0.1 good
ip-out permitted;IP:192.0.2.0/255.255.255.0 DNS:localhost,IP:127.0.0.1 : ip 127
ip-excluded excluded;IP:127.0.0.0/255.0.0.0 DNS:localhost,IP:127.0.0.1 : ip 127
e-mail permitted;email:a.example DNS:localhost good
mask DER:30:0e:a0:0c:30:0a:87:08:7f:00:00:01:ff:00:ff:00 DNS:localhost malformed
END
constrained strict 'critical,permitted;DNS:localhost' DNS:localhost
unfit strict 'critical name constraints' -C root.pem
accepts strict -C strict-ca.pem
constrained strict-out 'critical,permitted;DNS:a.example' DNS:localhost
unfit strict-out 'outside' -C strict-out-ca.pem
# An anchor with a key of P-521.
root wide -newkey ec -pkeyopt ec_paramgen_curve:P-521
issue by-wide wide "$here"
offer by-wide
accepts by-wide -C wide.pem

group 'TLS: certificates that are refused'

# Each of BearSSL's reasons has words: a CA or a certificate that has it.
openssl genrsa -out long.key 4104 2>/dev/null
openssl genrsa -out weak.key 1024 2>/dev/null
openssl ecparam -name secp256k1 -genkey -noout -out odd.key
issue long root "$issuing"
issue odd root "$issuing"
issue cannot root "$issuing
keyUsage=digitalSignature"
issue last root "$issuing,pathlen:0"
issue after last "$issuing"
issue critical root "$here
1.2.3.4=critical,DER:05:00"
issue weak root "$here"
openssl genrsa -out use.key 2048 2>/dev/null
issue use root "$here
keyUsage=keyEncipherment"
# Its issuer's name, but another key.
root middle-twin -subj /CN=middle
issue by-other-key middle-twin "$here"
cat by-other-key.pem middle.pem >by-other-key-chain.pem
for name in long odd cannot after; do
	issue "by-$name" "$name" "$here"
	cat "by-$name.pem" "$name.pem" >"by-$name-chain.pem"
done
cat by-after-chain.pem last.pem >by-last-chain.pem
cp by-after.key by-last.key
cat deep.pem server.pem middle.pem >swapped-chain.pem
cp deep.key swapped.key
# openssl would not serve a key that is too short.
cat >weak.cnf <<'END'
openssl_conf = init
[init]
ssl_conf = tls
[tls]
system_default = level
[level]
CipherString = ALL:@SECLEVEL=0
END
OPENSSL_CONF=$PWD/weak.cnf
export OPENSSL_CONF
while read -r name words; do
	offer "$name"
	unfit "$name" "$words" -C root.pem
done <<'END'
by-long-chain has a key or a signature of more than 4096 bits
by-odd-chain has a key or a signature of an unsupported type
by-cannot-chain a CA in its chain may not issue certificates (key usage)
by-last-chain was issued by a certificate that is not a CA's, or under too
critical has a critical extension that is not supported
weak has an RSA key of less than 2048 bits
use its certificate may not be used for TLS (key usage)
by-other-key-chain a signature in its chain is wrong
swapped-chain a certificate in its chain is not followed by its issuer's
END
unset OPENSSL_CONF
# What a CA issued to itself is exempt.
root own -addext 'nameConstraints=permitted;DNS:localhost'
issue own-again own "$issuing
subjectAltName=DNS:ca.example" -subj /CN=own
issue own-other own "$issuing
subjectAltName=DNS:ca.example"
for name in again other; do
	issue "by-own-$name" "own-$name" "$here"
	cat "by-own-$name.pem" "own-$name.pem" >"by-own-$name-chain.pem"
done
offer by-own-again-chain
accepts by-own-again -C own.pem
offer by-own-other-chain
unfit by-own-other 'dns ca.example' -C own.pem
# Two anchors of one name.
root twin -addext 'nameConstraints=permitted;DNS:a.example'
root free-twin -subj /CN=twin
cat free-twin.pem twin.pem >twins.pem
issue by-twin twin "$here"
issue by-free-twin free-twin "$here"
offer by-twin
unfit by-twin 'outside' -C twins.pem
offer by-free-twin
accepts by-free-twin -C twins.pem
# One that says, at length, that it is no authority.
issue no-ca root 'basicConstraints=DER:30:03:01:01:00'
issue by-no-ca no-ca "$here"
serve by-no-ca
dies 78 . 'step directory -C no-ca.pem -d "https://localhost:$port/dir"'
serve server openssl-min-proto-version=TLS1.3
dies 69 'TLS 1.2' 'step directory -d "https://localhost:$port/dir"'
# stream CODE: a server without TLS, on $port.
stream() {
	echo "$1" >stream.sh
	port=$(free_port)
	cp stream.sh "stream.$port"
	server_start socat "TCP-LISTEN:$port,bind=127.0.0.1,fork,\
reuseaddr" "EXEC:sh stream.$port" 2>/dev/null
	up "$port"
}
stream 'printf "HTTP/1.1 400 Bad Request\r\n\r\n"; cat >/dev/null'
dies 69 'TLS with localhost failed: it does not use TLS, or not TLS 1.2$' \
    'step directory -d "https://localhost:$port/dir"'
stream cat
dies 69 TLS 'step directory -d "https://localhost:$port/dir"'
# A server that has two names, and refuses all others.
serve_only server -servername other.example -servername_fatal \
    -cert2 server.pem -key2 server.key
dies 69 'failed: it does not serve that name' \
    'step directory -d "https://localhost:$port/dir"'
# Alerts, a record of another version, and a ServerHello of TLS 1.1
# (RFC 5246 6.2.1 and 7.2, RFC 6066 3, RFC 7301 3.2).
while read -r bytes words; do
	stream "echo $bytes | xxd -r -p; cat >/dev/null"
	dies 69 "TLS with localhost failed: $words" \
	    'step directory -d "https://localhost:$port/dir"'
done <<'END'
15030300020228 no TLS 1.2 cipher suite in common
15030300020246 it does not use TLS, or not TLS 1.2
15050300020228 it does not use TLS, or not TLS 1.2
15030300020270 it does not serve that name
15030300020278 it does not know the protocol
15030300020250 BearSSL error 336
END
zeros=$(printf '%064d' 0)
stream "echo 160303002a020000260302${zeros}00c02b00 | xxd -r -p; cat >/dev/null"
dies 69 'it does not use TLS, or not TLS 1.2' \
    'step directory -d "https://localhost:$port/dir"'
stream 'cat >/dev/null'
later handshake "step directory -T 2 -d https://localhost:$port/dir"
port=$(free_port)
later refusal "step directory -T 2 -d https://localhost:$port/dir"
later name 'step directory -T 2 -d https://nosuch.invalid/dir'
settle
dies 69 . 'replay handshake'
within handshake 2 3
dies 69 "$port" 'replay refusal'
dies 69 nosuch.invalid 'replay name'
within name 0 3

group 'trust anchors'

# pinned NAME SUBJECTALTNAME: self-signed by one key, and not a CA's.
pinned() {
	openssl req -x509 -key pinned.key -subj /CN=pinned -days 9 \
	    -addext basicConstraints=critical,CA:FALSE \
	    -addext "subjectAltName=$2" -out "$1.pem" 2>/dev/null
	cp pinned.key "$1.key"
}
openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 \
    -out pinned.key
pinned own DNS:localhost
pinned printer DNS:printer.test
mv own.key own1.key; cp own1.key own.key
serve own
check 'a pinned certificate that is not a CA'\''s' '
	step directory -C own.pem -d "https://localhost:$port/dir"'
cat printer.pem root.pem >pins.pem
dies 78 . ': its key makes no other certificate good
    step directory -C pins.pem -d "https://localhost:$port/dir"'
check 'ACME_CA_FILE' 'ACME_CA_FILE=root.pem "$acme" directory -d "$ca/dir"'
# Secrets of Kubernetes end with a newline, and so may all variables.
spaced() { printf '\n \t%s\r\n.' "$1"; }
check 'white space around the values of variables' '
	for name in "ACME_CA_FILE root.pem" "SSL_CERT_FILE root.pem" \
	    "ACME_DIRECTORY $ca/dir" "ACME_TIMEOUT 5" "ACME_BOX " \
	    "ACME_RESOLVE nowhere.invalid:$home:127.0.0.1" \
	    "https_proxy " "no_proxy localhost"; do
		value=$(spaced "${name#* }") && value=${value%.}
		ACME_DIRECTORY=$ca/dir ACME_CA_FILE=root.pem
		export ACME_DIRECTORY ACME_CA_FILE
		[ "${name%% *}" != SSL_CERT_FILE ] || unset ACME_CA_FILE
		[ "${name%% *}" != no_proxy ] || export https_proxy=127.0.0.1:1
		export "${name%% *}=$value" && "$acme" directory || exit
		unset https_proxy
	done
	value=$(spaced account.key) && ACME_KEY=${value%.} "$acme" thumbprint'
check 'SSL_CERT_FILE' 'SSL_CERT_FILE=root.pem "$acme" directory -d "$ca/dir"'
check 'ACME_CA_FILE goes before SSL_CERT_FILE' '
	ACME_CA_FILE=root.pem SSL_CERT_FILE=stranger.pem \
	    "$acme" directory -d "$ca/dir"'
check 'many anchors with text between' '
	{ echo text; cat stranger.pem; echo; echo more; sed "s/$/\r/" root.pem
	} >many.pem && step directory -C many.pem -d "$ca/dir"'
dies 78 . '"$acme" directory -T 3 -d "$ca/dir"'
dies 78 'the built-in roots' 'step directory -C builtin -d "$ca/dir"'
check '-C ./builtin is a file, and so is another name' '
	cp root.pem builtin && step directory -C ./builtin -d "$ca/dir"'
dies 78 'the built-in roots' \
    'ACME_CA_FILE=builtin SSL_CERT_FILE=root.pem "$acme" directory -d "$ca/dir"'
# bundled FILE COMMAND...: the system has this bundle, and no other.
bundled() {
	bundles=$(sed -n '/char bundle/,/^}/s/[^"]*"\([^"]*\)".*/\1/p' \
	    "$src/acme.c")
	unshare -m sh -c 'for file in $1; do
			[ ! -e "$file" ] || mount --bind "$2" "$file" || exit
		done
		shift 2; exec "$@"' sh "$bundles" "$@"
}
check 'a bundle of the system' \
    'bundled root.pem "$acme" directory -d "$ca/dir"'
for file in empty.pem leaf.key; do
	dies 78 'the built-in roots' \
	    "bundled $file '$acme' directory -d '$ca/dir'"
done
for kind in 'with a byte order mark' 'with white space'; do
	check "anchors $kind" '
		{ odd "$kind" stranger.pem; odd "$kind" root.pem; } >odd.pem
		step directory -C odd.pem -d "$ca/dir"'
done
check 'an anchor after one that is cut off' '
	{ head -n 3 stranger.pem; cat root.pem; } >odd.pem
	step directory -C odd.pem -d "$ca/dir"'
dies 66 none.pem 'step directory -C none.pem -d "$ca/dir"'
dies 65 empty.pem 'step directory -C empty.pem -d "$ca/dir"'
dies 65 leaf.key 'step directory -C leaf.key -d "$ca/dir"'

group 'names and addresses: a network with a name server of its own'

# names.c: the name server.  A-AAAA.names.test says what it answers for an
# address of IPv4 and of IPv6: "live" one, "dead" one that takes no
# connection, "two", the dead one first, or none, in many ways.  Other
# domains are there to be searched.
cat >names.c <<'END'
#include <sys/socket.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define COUNT(a) (sizeof(a) / sizeof (a)[0])

static unsigned char m[4096];	/* a question, then its answer */
static size_t n;

static void
add_record(int type, const char *text)
{
	unsigned char ip[16];
	size_t len = type == 1 ? 4 : 16;
	const unsigned char head[] = { 0xc0, 12, 0, type, 0, 1, 0, 0, 0, 0,
	    0, len };

	inet_pton(type == 1 ? AF_INET : AF_INET6, text, ip);
	memcpy(m + n, head, sizeof head);
	memcpy(m + n + sizeof head, ip, len);
	n += sizeof head + len;
	m[7]++;
}

static int
is_below(const char *name, const char *domain)
{
	size_t a = strlen(name), b = strlen(domain);

	return a > b && strcmp(name + a - b, domain) == 0;
}

/* What to answer, in one word. */
static const char *
kind_of(char *name, int type)
{
	char *second = strchr(name, '-');

	if (is_below(name, ".broken.test"))
		return "servfail";
	if (is_below(name, ".mute.test"))
		return "silent";
	if (is_below(name, ".wild.test"))
		return type == 1 ? "closed" : "none";
	if (is_below(name, ".search.test"))
		return type == 1 ? "live" : "none";
	if (!is_below(name, ".names.test") || !second)
		return "nxdomain";
	*second++ = 0;
	second[strcspn(second, ".")] = 0;
	return type == 1 ? name : second;
}

/* Make the question in m an answer; 0 if there shall be none. */
static int
answer(int tcp)
{
	static const char *const codes[] = { "", "", "servfail", "nxdomain",
	    "notimp", "refused" };
	char name[256] = "";
	size_t at = 12;
	const char *kind;
	FILE *f;
	int type;

	for (; m[at]; at += m[at] + 1)
		snprintf(name + strlen(name), sizeof name - strlen(name),
		    "%s%.*s", *name ? "." : "", m[at], (char *)m + at + 1);
	type = m[at + 2];
	n = at + 5;
	if ((f = fopen("asked", "a"))) {
		fprintf(f, "%d %s\n", type, name);
		fclose(f);
	}
	kind = kind_of(name, type);
	m[2] = 0x81;
	m[3] = 0x80;
	memset(m + 6, 0, 6);
	for (int i = 2; i < (int)COUNT(codes); i++)
		if (strcmp(kind, codes[i]) == 0)
			m[3] |= i;
	if (strcmp(kind, "cut") == 0 && !tcp)
		m[2] |= 2;
	else if (strcmp(kind, "cut") == 0 || strcmp(kind, "live") == 0)
		add_record(type, type == 1 ? "127.0.0.2" : "::1");
	else if (strcmp(kind, "closed") == 0)
		add_record(type, "127.0.0.9");
	else if (strcmp(kind, "dead") == 0 || strcmp(kind, "two") == 0)
		add_record(type, type == 1 ? "127.0.0.1" : "::2");
	if (strcmp(kind, "two") == 0)
		add_record(type, type == 1 ? "127.0.0.2" : "::1");
	return strcmp(kind, "silent") != 0;
}

static int
bound(int type, const char *ip, int port)
{
	struct sockaddr_in a = { .sin_family = AF_INET,
	    .sin_port = htons(port) };
	struct sockaddr_in6 b = { .sin6_family = AF_INET6,
	    .sin6_port = htons(port) };
	int fd = socket(strchr(ip, ':') ? AF_INET6 : AF_INET, type, 0);

	inet_pton(AF_INET, ip, &a.sin_addr);
	inet_pton(AF_INET6, ip, &b.sin6_addr);
	if ((strchr(ip, ':') ? bind(fd, (void *)&b, sizeof b) :
	    bind(fd, (void *)&a, sizeof a)) != 0)
		perror(ip);
	if (type == SOCK_STREAM)
		listen(fd, 0);
	return fd;
}

/* Fill the listener's queue: it drops what comes then. */
static void
make_dead(const char *ip)
{
	struct sockaddr_storage to;
	socklen_t len = sizeof to;
	int fd = bound(SOCK_STREAM, ip, 8443);

	getsockname(fd, (void *)&to, &len);
	for (int i = 0; i < 4; i++) {
		fd = socket(to.ss_family, SOCK_STREAM, 0);
		fcntl(fd, F_SETFL, O_NONBLOCK);
		connect(fd, (void *)&to, len);
	}
}

int
main(void)
{
	struct sockaddr_storage who;
	struct pollfd p[2] = {
	    { bound(SOCK_DGRAM, "127.0.0.1", 53), POLLIN, 0 },
	    { bound(SOCK_STREAM, "127.0.0.1", 53), POLLIN, 0 } };

	make_dead("127.0.0.1");
	make_dead("::2");
	close(open("ready", O_CREAT | O_WRONLY, 0600));
	for (;;) {
		socklen_t len = sizeof who;
		unsigned char size[2];
		int fd;

		poll(p, 2, -1);
		if (p[0].revents && recvfrom(p[0].fd, m, sizeof m, 0,
		    (void *)&who, &len) > 12 && answer(0))
			sendto(p[0].fd, m, n, 0, (void *)&who, len);
		if (!p[1].revents || (fd = accept(p[1].fd, NULL, NULL)) < 0)
			continue;
		if (recv(fd, size, 2, MSG_WAITALL) == 2 &&
		    recv(fd, m, size[1], MSG_WAITALL) > 12 && answer(1)) {
			size[0] = n >> 8;
			size[1] = n;
			write(fd, size, 2);
			write(fd, m, n);
		}
		close(fd);
	}
}
END
cc -w -o names names.c || exit
issue named root 'subjectAltName=DNS:*.names.test,DNS:short.ns,DNS:single,\
IP:127.0.0.2,IP:::1'
cat >named.hosts <<'END'
127.0.0.9 live-none.names.test.x xlive-none.names.test #live-none.names.test
# 127.0.0.9 x live-none.names.test
127.0.0.9	x	# live-none.names.test
127.0.0.2	x.test hosted.names.test twice.names.test
127.0.0.3	twice.names.test
END
# The network: the servers live while the command does.
cat >named.sh <<'END'
busybox ip link set lo up
busybox ip addr add ::2/128 dev lo
until ! busybox ip addr show dev lo | grep -q tentative; do
	sleep 0.02
done
mount --bind named.hosts /etc/hosts && mount --bind named.conf \
    /etc/resolv.conf || exit
rm -f ready
./names &
pids=$!
for listen in 'bind=127.0.0.2' 'pf=ip6,bind=[::1]'; do
	socat "OPENSSL-LISTEN:8443,$listen,fork,reuseaddr,verify=0,\
cert=named.pem,key=named.key" 'EXEC:sh serve.sh' &
	pids="$pids $!"
done >>servers.log 2>&1
until [ -e ready ] && grep -qi '0200007F:20FB ' /proc/net/tcp; do
	sleep 0.02
done
until ! grep -q 0 /proc/net/if_inet6 || grep -q '01000000:20FB ' /proc/net/tcp6
do
	sleep 0.02
done
"$@"
status=$?
kill $pids
exit "$status"
END
# inside_net COMMAND...: run it there.
inside_net() {
	own=-rnm
	[ "$(id -u)" != 0 ] || own=-nm
	unshare $own sh named.sh "$@"
}
# named HOST [OPTION]...: ask for the directory at that host, there.
named() {
	host=$1; shift
	answer GET_dir '200 OK' \
	    "$(printf %s "$directory" | sed "s|$ca|https://$host:8443|g")"
	inside_net "$acme" directory -C root.pem -T 4 \
	    -d "https://$host:8443/dir" "$@"
}
# looking_up N: such a step runs, with N processes that look up its name.
looking_up() {
	looker=$(pgrep -o -f "^$acme .*silent-silent") &&
	    [ "$(pgrep -c -P "$looker")" = "$1" ]
}
# search LINE...: what /etc/resolv.conf has beside the name server.
search() { printf '%s\n' 'nameserver 127.0.0.1' "$@" >named.conf; }
fresh
search

group 'names and addresses: the look-up'

check 'a name with addresses of both families' '
    rm -f asked; named live-live.names.test &&
    grep live-live.names.test asked'
for host in hosted.names.test 127.0.0.2 '[::1]' \
    'x.names.test -H x.names.test:8443:::1'; do
	check "no name server is asked for $host" '
	    rm -f asked; named $host && not cat asked'
done
for kind in servfail refused notimp nxdomain silent none; do
	check "no address of IPv6: $kind" "named live-$kind.names.test"
	check "no address of IPv4: $kind" "named $kind-live.names.test"
done
search 'options timeout:1'
dies 69 'find the address of servfail-none' 'named servfail-none.names.test'
search
dies 69 'find the address of nxdomain-nxd.*: Name' \
    'named nxdomain-nxdomain.names.test'
dies 69 'limit of 1 s reached while looking up the address of silent-silent' \
    'named silent-silent.names.test -T 1'
check 'no process that looks a name up outlives the step' '
    not pgrep -f "^$acme directory .*silent-silent"'
search 'options timeout:30 attempts:5'
check 'nor, for longer than its time limit, a step that SIGKILL ends' '
    named silent-silent.names.test -T 3 &
    await looking_up 2 && kill -9 "$looker" &&
    await not pgrep -f "^$acme directory .*silent-silent"'
search 'search broken.test' 'options ndots:5'
check 'without /etc/hosts a name with a dot is not searched, either' '
    named live-none.names.test && rm -f asked &&
    inside_net sh -c "mount -t tmpfs none /etc && ! [ -e /etc/hosts ] &&
	cp named.conf /etc/resolv.conf && \"\$@\"" sh "$acme" directory \
	-C root.pem -T 4 -d https://live-none.names.test:8443/dir &&
    grep names.test asked && not grep broken.test asked'
search
check 'an answer cut short: found over TCP, or said so' '
    named cut-cut.names.test 2>err
    case $? in 0) ;; 69) cat err; grep "truncated.*use -H" err ;;
    *) false ;; esac'

for domain in broken mute wild; do
	search "search $domain.test" 'options ndots:5'
	check "a name with a dot is not searched in $domain.test" \
	    'named live-none.names.test'
	check "/etc/hosts goes before a search in $domain.test" \
	    'named hosted.names.test'
done
search 'search none.test search.test' 'options ndots:5'
check 'a name without a dot is searched' 'named single'
check 'a name with a dot is searched if it is not there itself' \
    'named short.ns'
search

group 'names and addresses: the connection'

check 'an address of IPv6 that is dead costs a moment' \
    'named live-dead.names.test -T 2'
check 'one of IPv4 too' 'named dead-live.names.test -T 2'
check 'the first of two addresses is dead' 'named two-none.names.test -T 2'
check '-4 goes without IPv6' 'named live-dead.names.test -4 -T 2'
check '-6 goes without IPv4' 'named dead-live.names.test -6 -T 2'
dies 69 'find the address' 'named live-none.names.test -6'
check '-H: the first of two addresses is dead' '
    named x.names.test -T 2 -H x.names.test:8443:127.0.0.1 \
	-H x.names.test:8443:127.0.0.2'
dies 69 '-4 or -6 excludes' '
    named x.names.test -6 -H x.names.test:8443:127.0.0.2'
dies 69 'refused' '
    named x.names.test -H x.names.test:8443:2001:db8::1 \
	-H x.names.test:8443:127.0.0.9 -H x.names.test:8443:2001:db8::2'
dies 69 'limit of 1 s reached while connecting to dead-dead' \
    'named dead-dead.names.test -T 1'

group 'HTTP'

fresh
# hello FORMAT: whatever its framing, the reply is hello; it then closes.
hello() {
	closing POST_it "$1"
	check "accepted: $(printf %s "$1" | sed 's/\\r\\n/ | /g')" \
	    'is hello "get it"'
}
hello 'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello'
hello 'HTTP/1.1 200 OK\r\ncontent-length:5\r\n\r\nhello'
hello 'HTTP/1.1 200 OK\r\nCONTENT-LENGTH: \t 5 \t\r\n\r\nhello'
hello 'HTTP/1.1 200 OK\r\nContent-Length: 00005\r\n\r\nhello'
hello 'HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nhello'
hello 'HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello'
hello 'HTTP/1.1 200 OK\nContent-Length: 5\n\nhello'
hello 'HTTP/1.0 200 OK\r\n\r\nhello'
hello 'HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello'
hello 'HTTP/1.1 200 OK\r\n\r\nhello'
hello 'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello'
hello 'HTTP/1.1 200 OK\r\nX:\r\nConnection: close\r\n\r\nhello'
hello 'HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nhello'
hello 'HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 Processing\r
\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello'
chunked='HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n'
hello "${chunked}5\r\nhello\r\n0\r\n\r\n"
hello "${chunked}1\r\nh\r\n3\r\nell\r\n1\r\no\r\n0\r\n\r\n"
hello "${chunked}005\r\nhello\r\n0000\r\n\r\n"
hello "${chunked}5;a=b;c=\"d\"\r\nhello\r\n0;e\r\n\r\n"
hello "${chunked}5 ; a\r\nhello\r\n0\r\n\r\n"
hello "${chunked}5\r\nhello\r\n0\r\nX: y\r\nContent-Length: 9\r\n\r\n"
hello "${chunked}5\nhello\n0\n\n"
hello 'HTTP/1.1 200 OK\r\ntransfer-encoding:Chunked\r\n\r\n5\r\nhello\r\n0\r
\r\n'
check 'chunk sizes are hexadecimal in either case' '
	raw POST_it "${chunked}A\r\n0123456789\r\n0b\r\nabcdefghijk\r\n\
0\r\n\r\n"
	is 0123456789abcdefghijk "get it"'
check 'a reply of 200 kB, by its length' '
	head -c 200000 /dev/zero | tr "\0" x >body
	answer POST_it "200 OK" "$(cat body)"
	get it | cmp - body'
check 'and in chunks' '
	{ printf "$chunked"
	for i in 1 2 3 4; do
		printf "c350\r\n"; head -c 50000 body; printf "\r\n"
	done
	printf "0\r\n\r\n"; } >www/POST_it
	get it | cmp - body'
check 'a reply may hold any byte' '
	printf "\0\377\r\n\0" >body
	{ printf "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"; cat body
	} >www/POST_it
	get it | cmp - body'
check 'HEAD has no body, whatever it says' '
	raw HEAD_newNonce "HTTP/1.1 200 OK\r\nReplay-Nonce: n0\r
Content-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n"
	answer POST_it "200 OK" hello
	is hello "get it"'
check '204 has no body' '
	fresh
	raw HEAD_newNonce "HTTP/1.1 204 No Content\r\nreplay-nonce:n0\r\n\r\n"
	answer POST_it "200 OK" hello
	is hello "get it"'
check 'one connection carries all requests' '
	fresh
	runs GET_dir "sleep 0; echo \$PPID >>peers; cat GET_plain"
	runs HEAD_newNonce "echo \$PPID >>peers; cat HEAD_plain"
	raw HEAD_plain "HTTP/1.1 200 OK\r\nReplay-Nonce: n0\r\n\r\n"
	answer GET_plain "200 OK" "$directory"
	runs POST_newAccount "echo \$PPID >>peers; cat POST_plain"
	answer POST_plain "201 Created" "{\"status\":\"valid\"}" \
	    "Location: $ca/account/1"
	step new-account -d "$ca/dir" && is 3 "wc -l <www/peers" &&
	is 1 "sort -u www/peers | wc -l"'
check 'a connection that was closed is opened again' '
	fresh
	: >www/HEAD_newNonce.close
	answer POST_it "200 OK" hello
	is hello "get it"'

group 'HTTP: responses that are refused'

# breaks STATUS WORDS FORMAT: a reply that is refused at once.
breaks() {
	closing POST_it "$3"
	status=$1 words=$2
	dies "$status" "$words" ": '${3%%hello*}'; get it"
}
fresh
ok='HTTP/1.1 200 OK\r\n'
breaks 76 . "${ok}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n\
5\r\nhello\r\n0\r\n\r\n"
breaks 76 . "${ok}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n\
5\r\nhello\r\n0\r\n\r\n"
breaks 76 . "${ok}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"
for length in -5 +5 '' 5x 0x5 '5 5' '5, 6' 5.0 ' ' '٥'; do
	breaks 76 . "${ok}Content-Length: $length\r\n\r\nhello"
done
breaks 7[06] . "${ok}Content-Length: 18446744073709551621\r\n\r\nhello"
breaks 7[06] . "${ok}Content-Length: 4294967301\r\n\r\nhello"
breaks 76 . "${ok}Transfer-Encoding: gzip\r\n\r\nhello"
breaks 76 . "${ok}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
breaks 76 . "${ok}Transfer-Encoding: xchunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
for size in '' g -5 +5 0x5 ' 5' '5 5' ';x' \"5\"; do
	breaks 76 . "${chunked}$size\r\nhello\r\n0\r\n\r\n"
done
breaks 7[06] . "${chunked}10000000000000005\r\nhello\r\n0\r\n\r\n"
breaks 7[06] . "${chunked}100000005\r\nhello\r\n0\r\n\r\n"
breaks 76 . "${chunked}5\r\nhelloX\r\n0\r\n\r\n"
breaks 69 . "${chunked}5\r\nhello\r\n0\r\nX: y\r\n"
breaks 76 . "${chunked}5\r\nhello0\r\n\r\n"
breaks 76 . '<html>hello</html>\r\n\r\n'
breaks 76 . '\r\n\r\nhello'
for status in 'HTTP/1.1 abc OK' 'HTTP/1.1' 'HTTP/1.1 20 OK' \
    'HTTP/1.1 2000 OK' 'HTTP/1.1 -20 OK' 'HTTP/2 200 OK' 'ICY 200 OK' \
    'HTTP/1.x 200 OK' 'HTTP/1.1 999 OK' 'http/1.1 200 OK' \
    'XHTTP/1.1 200 OK' 'HTTP/1.1  200 OK' 'HTTP/1.1 000 OK'; do
	breaks 76 . "$status\r\nContent-Length: 5\r\n\r\nhello"
done
breaks 76 . 'HTTP/1.1 2\00000 OK\r\nContent-Length: 5\r\n\r\nhello'
breaks 76 . "${ok}X: a\000b\r\nContent-Length: 5\r\n\r\nhello"
breaks 76 . "${ok}Content-Length: 5\000\r\n\r\nhello"
breaks 76 . "${ok}nonsense\r\nContent-Length: 5\r\n\r\nhello"
breaks 76 . "${ok}: x\r\nContent-Length: 5\r\n\r\nhello"
for code in 300 301 302 303 304 307 308; do
	breaks 76 . "HTTP/1.1 $code X\r\nLocation: $ca/dir\r
Content-Length: 0\r\n\r\n"
done
check 'a POST is never sent on' '[ ! -e www/head.GET_dir.1 ]'

check 'a long head within the limit' '
	{ printf "$ok"; yes "X: 0123456789" | head -n 600
	printf "Content-Length: 5\r\n\r\nhello"; } >www/POST_it
	is hello "get it"'
limit() {
	closing POST_it "$ok"
	eval "$1" >>www/POST_it
	dies 70 "$2" ": '$1'; get it"
}
limit 'yes "X: 0123456789" | head -n 3000' .
limit 'printf X:; head -c 40000 /dev/zero | tr "\0" x' .
limit 'head -c 40000 /dev/zero | tr "\0" x' .
limit 'printf "Content-Length: 300000\r\n\r\n"
    head -c 300000 /dev/zero' .
limit 'printf "\r\n"; head -c 300000 /dev/zero' .
limit 'printf "Transfer-Encoding: chunked\r\n\r\n"
    yes "1000
$(head -c 4096 /dev/zero | tr "\0" x)" | head -n 200' .
endless() {
	runs POST_it "printf '$ok$2'; yes \"\$(printf '$3')\""
	dies "$1" . ": 'endless $2$3'; get it"
}
endless 70 '' 'X: y'
endless 70 '\r\n' hello
endless 7[06] 'Transfer-Encoding: chunked\r\n\r\n' '1\r\nx\r'
endless 7[06] 'Transfer-Encoding: chunked\r\n\r\n1;' x
endless 7[06] 'Transfer-Encoding: chunked\r\n\r\n0\r\n' 'X: y'

group 'HTTP: waiting, and trying again'

# All that waits, at once: it takes as long as the slowest.
fresh
try() { later "$1" "step get -a account -T ${2-5} $ca/$1"; }
retry() { later "$1" "step get -a account -T ${2-9} $ca/$1"; }
closing POST_cut1 HTTP/1.1
closing POST_cut2 'HTTP/1.1 200 OK\r\n'
closing POST_cut3 'HTTP/1.1 200 OK\r\nContent-Le'
closing POST_cut4 'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n'
closing POST_cut5 'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n'
closing POST_cut6 'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell'
closing POST_cut7 "$chunked"
closing POST_cut8 "${chunked}5"
closing POST_cut9 "${chunked}5\r\nhel"
closing POST_cut10 "${chunked}5\r\nhello"
closing POST_cut11 "${chunked}5\r\nhello\r\n"
closing POST_cut12 "${chunked}5\r\nhello\r\n0\r\n"
closing POST_cut13 "${chunked}5\r\nhello\r\n0\r\nX: y"
drop POST_drop1 'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell'
drop POST_drop2 "${chunked}5\r\nhello\r\n"
drop POST_drop3 'HTTP/1.1 200 OK\r\n\r\nhello'
drop POST_drop4 'HTTP/1.1 200 OK\r\n'
truncated='cut1 cut2 cut3 cut4 cut5 cut6 cut7 cut8 cut9 cut10 cut11 cut12
cut13 drop1 drop2 drop3 drop4'
for name in $truncated; do
	retry "$name"
done
runs POST_masked 'cat >/dev/null'
later masked 'timeout -s KILL 20 env --block-signal=ALRM --block-signal=TERM \
    "$acme" get -C root.pem -k account.key -T 2 -a account "$ca/masked"'
runs POST_stall1 'cat >/dev/null'
runs POST_stall2 'printf HTTP/1.1; cat >/dev/null'
runs POST_stall3 "printf '$ok'; cat >/dev/null"
runs POST_stall4 "printf '${ok}Content-Length: 5\r\n\r\nhell'
    cat >/dev/null"
runs POST_stall5 "printf '${chunked}5\r\nhe'; cat >/dev/null"
runs POST_drip1 "printf '${ok}X: '; while printf x; do sleep 0.3; done"
runs POST_drip2 "printf '${ok}\r\n'; while printf x; do sleep 0.3; done"
runs POST_drip3 \
    'while printf "HTTP/1.1 100 Continue\r\n\r\n"; do sleep 0.3; done'
stalled='stall1 stall2 stall3 stall4 stall5 drip1 drip2 drip3'
for name in $stalled; do
	try "$name" 2
done
busy='503 Service Unavailable'
answer POST_again.1 "$busy" '<html>busy</html>' 'Content-Type: text/html'
answer POST_again '200 OK' hello
drop POST_dropped.1 ''
answer POST_dropped '200 OK' hello
closing POST_closed.1 ''
answer POST_closed '200 OK' hello
answer POST_broken '502 Bad Gateway' '<html>\033[31mbad</html>'
answer POST_soon.1 "$busy" '' 'Retry-After: 1'
answer POST_soon '200 OK' hello
answer POST_much.1 "$busy" '' 'Retry-After: 2'
answer POST_much '200 OK' hello
for name in again dropped closed broken soon much; do
	retry "$name"
done
closing POST_never ''
retry never
# A pause that nobody can make sense of is one of ours.
i=0
for after in -1 x '' 'Sun, 06 Nov 1994 08:49:37 GMT' \
    'Sun, 99 Foo 1994 08:49:37 GMT'; do
	answer "POST_after$((i += 1)).1" "$busy" '' "Retry-After: $after"
	answer "POST_after$i" '200 OK' hello
	retry "after$i"
done
settle
for name in $truncated; do
	dies 69 . "replay $name"
done
dies 69 'time limit' 'replay masked'
for name in $stalled; do
	dies 69 . "replay $name"
	within "$name" 1 3
done
for name in again dropped closed soon much after1 after2 after3 after4 \
    after5; do
	check "tried again: $name" "is hello 'replay $name'"
done
within soon 1 4
within much 2 5
dies 69 502 'replay broken'
within broken 3 9
check 'it was tried four times or fewer' '
	n=$(grep -cx POST_broken www/requests); echo "$n"
	[ "$n" -gt 1 ] && [ "$n" -le 4 ]'
dies 69 . 'replay never'

fresh
answer POST_shown.1 "$busy" '' 'Retry-After: 1'
answer POST_shown '200 OK' hello
cat >waits.sh <<END
"$acme" get -C root.pem -k account.key -T 9 -a account $ca/shown >shown
END
check 'on a terminal the wait, and the longest one, are shown and erased' '
	socat -t 30 - "EXEC:sh waits.sh,pty,setsid,ctty,stderr" >typed
	cat -v typed; is hello "cat shown" &&
	erase=$(printf "\r\033[K") && printf %s "${erase}acme-step: get: " \
	    "pausing at the CA'\''s request, 9 s$erase" | cmp - typed'
check 'but not on a pipe' '
	rm www/requests shown &&
	is "" "sh waits.sh 2>&1" && is hello "cat shown"'

fresh
limited='{"type":"urn:ietf:params:acme:error:rateLimited",
"detail":"too many"}'
answer POST_it "$busy" '' 'Retry-After: 9999'
dies 75 9999 'get it'
answer POST_it '429 Too Many Requests' "$limited" 'Retry-After: 8888'
dies 75 8888 'get it'
answer POST_it '429 Too Many Requests' "$limited" \
    "Retry-After: $(LC_ALL=C date -u -d '7777 seconds' \
	'+%a, %d %b %Y %T GMT')"
dies 75 '777[4-7]' 'get it'
answer POST_it '429 Too Many Requests' "$limited"
dies 75 'too many' 'get it'
for after in 99999999999999999999 'Sun, 06 Nov 2094 08:49:37 GMT'; do
	answer POST_it "$busy" '' "Retry-After: $after"
	dies 75 . ": '$after'; get it"
done

group 'the directory'

# redirect REQUEST CODE URL: this is the response to it.
redirect() {
	raw "$1" "HTTP/1.1 $2 X\r\nLocation: $3\r\nContent-Length: 0\r\n\r\n"
}
for code in 301 302 307 308; do
	check "a redirect, $code" "fresh; redirect GET_old $code $ca/dir
	    step directory -d $ca/old >out && grep $ca/newOrder out"
done
# The same server at another port: another origin.
serve server
other=https://localhost:$port
answer GET_dir2 '200 OK' "$(printf %s "$directory" | sed "s|$ca|$other|g")"
check 'a redirect to another port' '
	redirect GET_old 302 "$other/dir2"
	step directory -d "$ca/old" >out && grep "$other/newOrder" out'
dies 78 'other than an https URL: http:' '
	redirect GET_old 302 "http://localhost:$home/dir"
	step directory -d "$ca/old"'
dies 78 'HTTP status 302' '
	redirect GET_old 302 "$ca/old"; step directory -d "$ca/old"'
dies 78 'other than an https URL' '
	redirect GET_old 302 nonsense; step directory -d "$ca/old"'
dies 78 'HTTP status 302' '
	raw GET_old "HTTP/1.1 302 X\r\nContent-Length: 0\r\n\r\n"
	step directory -d "$ca/old"'
dies 78 'old is not an ACME directory: HTTP status 404' '
	rm -f www/GET_old; step directory -d "$ca/old"'
for name in newAccount newOrder; do
	endpoints=$(printf %s "$directory" | sed "s/\"$name\"/\"no$name\"/")
	dies 76 "dir lacks $name$" '
	    answer GET_dir "200 OK" "$endpoints"
	    case $name in
	    newOrder)	step new-order -a account a.example ;;
	    *)		step new-account -y -d "$ca/dir" ;;
	    esac'
done
fresh
# A CA that refuses or limits its clients, or is down, may have one.
answer GET_old '403 Forbidden' '<html>'
dies 77 403 'step directory -d "$ca/old"'
answer GET_old '429 Slow down' '{"detail":"slowly"}'
dies 75 slowly 'step directory -d "$ca/old"'
answer GET_old '500 Oops' '<html>'
dies 69 500 'step directory -d "$ca/old"'
# meta JSON: the directory with this at its end.
meta() { answer GET_dir '200 OK' "${directory%\}},$1}"; }
for meta in '"meta":null' '"meta":{}' '"x":{"meta":[1]}' \
    '"meta":{"termsOfService":null,"profiles":null}' \
    '"meta":{"website":7,"caaIdentities":"x"}' \
    '"xQz_9":"https://community.example/t/random"'; do
	check "directory with $meta" "meta '$meta'
	    step directory -d $ca/dir >out && grep $ca/newOrder out"
done
check 'what the directory prints' '
	meta "\"meta\":{\"termsOfService\":\"https://a.example/terms\",
	    \"externalAccountRequired\":true,
	    \"profiles\":{\"classic\":\"the usual\"}}"
	step directory -d "$ca/dir" >out && cat out &&
	grep https://a.example/terms out && grep classic out'
check 'a directory without a path' '
	answer GET_ "200 OK" "$directory"
	step directory -d "$ca" >out && grep "$ca/newOrder" out'
for text in '' '[]' '"x"' '{}' '{' 'null' '<html>' '{"newNonce":1}'; do
	dies 78 'is not an ACME directory' "
	    answer GET_dir '200 OK' '$text'
	    step new-order -k account.key -a account a.example"
done
dies 76 newNonce 'answer GET_dir "200 OK" \
	"$(printf %s "$directory" | sed "s|https|http|")"
	step new-account -d "$ca/dir"'
dies 76 . 'meta "\"newOrder\":\"x\ny\""
	answer GET_dir "200 OK" \
	    "{\"newNonce\":\"$ca/nonce\",\"newOrder\":\"$ca/a b\"}"
	step new-order -a account a.example'
for line in '"meta":{"termsOfService":"https://a/\nfailed 0 x y"}' \
    '"meta":{"profiles":{"a\nb":"c"}}'; do
	check "directory with $line keeps its lines" "
	    answer GET_dir '200 OK' '${directory%\}},$line}'
	    step directory -d $ca/dir >out; cat out
	    ! grep -e '^failed' -e '^b' out"
done

group 'JWS: openssl verifies what we sign'

# protected FILE MEMBER: a member of the protected header.
part() { sed 's/.*"'"$2"'" *: *"\([^"]*\)".*/\1/' "$1"; }
protected() { part "$1" protected | from_base64url; }
# verifies KEY DIGEST FILE: the JWS is one of this key's (RFC 7515 5.2).
verifies() {
	printf %s "$(part "$3" protected).$(part "$3" payload)" >input
	jws=$3 bits=$2
	[ "$bits" != rsa ] || bits=256
	part "$jws" signature | from_base64url >signature
	openssl pkey -in "$1" -pubout -out public.pem
	if [ "$2" != rsa ]; then
		half=$(($(stat -c %s signature) / 2))
		[ "$half" = $(($2 / 8)) ] || return
		hex=$(xxd -p signature | tr -d '\n')
		printf '%s\n' asn1=SEQUENCE:s '[s]' \
		    "r=INTEGER:0x$(printf %s "$hex" | head -c $((2 * half)))" \
		    "s=INTEGER:0x$(printf %s "$hex" | tail -c $((2 * half)))" \
		    >asn1.cnf
		openssl asn1parse -genconf asn1.cnf -noout -out signature
	fi
	openssl dgst "-sha$bits" -verify public.pem \
	    -signature signature input
}
fresh
answer POST_it '200 OK' hello
for key in ec256:256:ES256 ec384:384:ES384 rsa2048:rsa:RS256 \
    rsa4096:rsa:RS256; do
	alg=${key##*:} type=${key%%:*} digest=${key#*:}
	digest=${digest%:*}
	rm -f www/requests
	check "$alg by $type" "get_it=\$(step get -k $type.pem -a account \
		$ca/it) && verifies $type.pem $digest www/body.POST_it.1"
	check "$alg by $type: the protected header" "
	    is '{\"alg\":\"$alg\",\"kid\":\"$ca/account/1?x=y\",\
\"nonce\":\"n0\",\"url\":\"$ca/it\"}' \
		'protected www/body.POST_it.1 | tr -d \" \" | tr -d {} |
		 tr , \"\\n\" | sort | paste -s -d , | sed \"s/.*/{&}/\"'"
done
check 'POST-as-GET has an empty payload (RFC 8555 6.3)' \
    'is "" "part www/body.POST_it.1 payload"'
cut_names() { sed 's/^{*"\([a-z]*\)".*/\1/'; echo; }
check 'it is a flattened JWS, its type said (RFC 8555 6.2)' '
	is "payload protected signature" \
	    "tr , \"\n\" <www/body.POST_it.1 | cut_names | sort | xargs" &&
	grep -ix "content-type: application/jose+json" www/head.POST_it.1'
check 'each request says its host, length and agent' '
	for f in www/head.*; do
		grep -ix "host: localhost:$home" "$f" &&
		grep -i "^user-agent: acme-step" "$f" || exit
	done
	grep -i "^content-length: [0-9]*$" www/head.POST_it.1'
check 'post signs what it reads' '
	rm www/requests
	is hello "echo \"{\\\"a\\\": [1]}\" | step post -a account $ca/it" &&
	is "{\"a\": [1]}" "part www/body.POST_it.1 payload | from_base64url" &&
	verifies account.key 256 www/body.POST_it.1'
# The first request is for a nonce.
check 'a box shows no control characters and marks of direction' '
	printf "{\n\"a\":\"\302\233\342\200\216\177\"}" >marks
	for i in 1 2; do
		step post -B box -a account "$ca/it" <marks
		[ $? = 75 ] && "$acme" send -C root.pem box || exit
	done
	cat box/2.request
	grep -F "# payload: { \"a\":\"??????\"}" box/2.request'
dies 65 JSON 'echo "{" | step post -a account "$ca/it"'
dies 65 . 'step post -a account "$ca/it" </dev/null'
check 'a new account is signed with its jwk' '
	fresh
	answer POST_newAccount "201 Created" "{\"status\":\"valid\"}" \
	    "Location: $ca/account/1"
	step new-account -d "$ca/dir" -y -m mailto:a@a.example >out &&
	grep -x "account $ca/account/1" out &&
	verifies account.key 256 www/body.POST_newAccount.1 &&
	protected www/body.POST_newAccount.1 >header &&
	grep -q "\"jwk\": *$(jwk account.key)" header &&
	! grep kid header &&
	part www/body.POST_newAccount.1 payload | from_base64url >payload &&
	grep -q "\"termsOfServiceAgreed\": *true" payload &&
	grep -q "\"contact\": *\[\"mailto:a@a.example\"\]" payload'

group 'ACME: orders'

# order STATUS [MEMBERS]: an order, with more members at its end.
order() {
	printf '{"status":"%s","identifiers":%s,"authorizations":["%s"],%s}' \
	    "$1" '[{"type":"dns","value":"a.example"}]' "$ca/authz" \
	    "\"finalize\":\"$ca/finalize\"${2+,$2}"
}
new_order() { step new-order -a account a.example; }
created='201 Created'
fresh
answer POST_newOrder "$created" "$(order pending)" "Location: $ca/order"
check 'an order as a record' '
	new_order >out && cat out &&
	for line in "directory $ca/dir" "new-nonce $ca/newNonce" \
	    "nonce fresh_nonce" "account $ca/account/1?x=y" \
	    "order $ca/order" "status pending" "identifier dns a.example" \
	    "authorization $ca/authz" "finalize $ca/finalize"
	do
		grep -Fqx "$line" out || { echo "no $line"; exit 1; }
	done'

# says BODY: the CA says so to a newOrder, and the step ends with 76.
says() {
	answer POST_newOrder "$created" "$1" "Location: $ca/order"
	dies 76 . ": '$1'; new_order"
}
says ''
says '{'
says 'null'
says '[]'
says '"ready"'
says '<html>'
says "$(order pending) x"
says "$(order pending | sed 's/.*/[[[[&]]]]/')"
says '{"status":1}'
says '{"status":"pending"}'
deep=$(head -c 300 /dev/zero | tr '\0' '[')
answer POST_newOrder "$created" "$(order pending "\"x\":$deep")" \
    "Location: $ca/order"
dies 76 . ': nested 300 deep; new_order'
answer POST_newOrder "$created" "$(order pending \
    "\"x\":$deep$(echo "$deep" | tr '[' ']')")" "Location: $ca/order"
dies 76 . ': nested 300 deep, and closed; new_order'
# change FROM TO: an order with something else in it.
changed() { says "$(order pending | sed "s|$1|$2|")"; }
changed '"status":"pending",' ''
changed '"pending"' null
changed '"pending"' 7
changed '"pending"' '"a b"'
changed '"pending"' '"pending\\nfailed"'
changed '"pending"' '""'
changed ',"finalize.*' '}'
for url in null 7 '[]' '""' '"http://localhost/f"' '"ftp://localhost/f"' \
    '"f"' '"https://"' '"https://localhost/a b"' \
    '"https://localhost:000443/f"' '"https://localhost:65536/f"' \
    '"https://localhost/a\\nfailed 0 x y"' '"https://localhost/\\u0000"' \
    '"https://localhost/\\u001b[31m"' '"https://localhost/\\u007f"'; do
	changed '"finalize":.*"' "\"finalize\":$url"
	changed '"authorizations":\[.*\]' "\"authorizations\":[$url]"
done
changed '"authorizations":\[.*\]' '"authorizations":"x"'
changed '"authorizations":\[.*\]' '"authorizations":{}'
for value in '7' 'null' '""' '"a b"' '"a\\nfailed 0 x y"' '"a\\u0000"' \
    '"\\u001b[31m"' '["a"]' '"a\\tb"' '"ä.example"'; do
	changed '"a.example"' "$value"
done
for type in '7' 'null' '"d ns"' '"\\n"' '""'; do
	changed '"dns"' "$type"
done
changed '"identifiers":\[[^]]*\]' '"identifiers":{}'
changed '"identifiers":\[[^]]*\]' '"identifiers":["a.example"]'
for member in '"expires":7' '"expires":"x\ny"' '"expires":"a b"' \
    '"certificate":7' '"certificate":"http://localhost/c"' \
    '"certificate":"https://localhost/c c"'; do
	says "$(order valid "$member")"
done
answer POST_newOrder "$created" "$(order pending)"
dies 76 Location ': no Location; new_order'
for place in "http://localhost:$home/order" 'nonsense' "$ca/a b" '' \
    'https:///x' "$ca/$(head -c 5000 /dev/zero | tr '\0' x)"; do
	answer POST_newOrder "$created" "$(order pending)" "Location: $place"
	dies 76 Location ": Location: ${place%xxxx*}; new_order"
done

# takes_order NAME BODY LINE: it is accepted, and the record has the line.
takes_order() {
	answer POST_newOrder "$created" "$2" "Location: $ca/order"
	check "$1" "new_order >out; got=\$?; cat out
	    [ \$got = 0 ] && grep -Fqx '$3' out"
}
takes_order 'null members are absent ones' "$(order ready '"expires":null,
"certificate":null,"error":null,"notBefore":null')" 'status ready'
takes_order 'unknown members' \
    "$(order ready '"x":{"y":[1,{"z":null}]},"big":123456789012345678901')" \
    'status ready'
takes_order 'escapes in URLs' "$(order ready |
    sed 's|/|\\/|g; s|finalize"}|fin\\u0061lize"}|')" "finalize $ca/finalize"
takes_order 'an order that is ready at once, without authorizations' \
    "{\"status\":\"ready\",\"finalize\":\"$ca/finalize\"}" 'status ready'
takes_order 'an order without identifiers has those that were asked for' \
    "{\"status\":\"ready\",\"finalize\":\"$ca/finalize\"}" \
    'identifier dns a.example'
takes_order 'an order with capitals' \
    "$(order ready | sed 's/a.example/A.Example/')" 'status ready'
takes_order 'an order with its expiry' \
    "$(order ready '"expires":"2030-01-01T00:00:00.5Z"')" \
    'expires 2030-01-01T00:00:00.5Z'
for nonce in 'a b' 'a=b' 'ä' '' '"x"' "$(head -c 5000 /dev/zero |
    tr '\0' x)"; do
	answer POST_newOrder "$created" "$(order ready)" \
	    "Location: $ca/order"
	sed "s|fresh_nonce|$nonce|" www/POST_newOrder >www/sed
	mv www/sed www/POST_newOrder
	check "a nonce that is none is ignored: ${nonce%xxxx*}" \
	    'new_order >out && cat out && ! grep "^nonce" out'
done

group 'ACME: nonces and problems'

problem() { printf '{"type":"urn:ietf:params:acme:error:%s"%s}' "$1" "$2"; }
error() { answer "POST_$1" '400 Bad Request' "$(problem "$2" "$3")" \
    'Content-Type: application/problem+json'; }
fresh
error it.1 badNonce ',"detail":"no"'
answer POST_it '200 OK' hello
check 'badNonce, with a nonce' 'is hello "get it" &&
    protected www/body.POST_it.2 | grep "\"fresh_nonce\"" &&
    is 1 "grep -c newNonce www/requests"'
fresh
raw POST_it.1 "HTTP/1.1 400 x\r\nContent-Length: 46\r\n\r\n$(problem \
    badNonce '')"
answer POST_it '200 OK' hello
raw HEAD_newNonce.2 'HTTP/1.1 200 OK\r\nReplay-Nonce: n2\r\n\r\n'
check 'badNonce, without' 'is hello "get it" &&
    protected www/body.POST_it.2 | grep "\"n2\""'
fresh
error it badNonce ',"detail":"never"'
later nonce 'step get -a account -T 2 "$ca/it"'
settle
check 'badNonce for ever ends within the limit' '
	cat nonce.*; case $(cat nonce.status) in 75|77) ;; *) exit 1 ;; esac'
within nonce 0 3
fresh
for i in 1 2 3 4 5 6 7 8 9; do
	error it.$i badNonce ''
done
answer POST_it '200 OK' hello
check 'nine nonces in ten are refused' 'is hello "get it"'
fresh
answer POST_it '200 OK' hello
raw HEAD_newNonce 'HTTP/1.1 405 x\r\nContent-Length: 0\r\n\r\n'
raw GET_newNonce 'HTTP/1.1 204 x\r\nReplay-Nonce: by_get\r\n\r\n'
check 'a nonce is had by GET alone' 'is hello "get it" &&
    protected www/body.POST_it.1 | grep "\"by_get\""'
raw GET_newNonce 'HTTP/1.1 204 x\r\n\r\n'
dies 76 nonce 'get it'

# refuses WORDS STATUS BODY: the CA's no, and the words that we must say.
refuses() {
	answer POST_it "$2" "$3"
	dies 77 "$1" ": '$3'; get it"
}
fresh
no='403 Forbidden'
refuses 'unauthorized.*not yours' "$no" \
    "$(problem unauthorized ',"detail":"not yours"')"
refuses 'not yours' "$no" '{"detail":"not yours"}'
refuses 'not yours' "$no" '{"type":null,"status":null,"detail":"not yours"}'
refuses 'malformed' "$no" "$(problem malformed ',"detail":null')"
refuses 'malformed' "$no" "$(problem malformed ',"detail":7')"
refuses 'about:blank' "$no" '{"type":"about:blank","detail":"x"}'
refuses 'a is bad.*b.example.*b is bad' "$no" \
    "$(problem compound ',"detail":"two",
"subproblems":[{"type":"urn:ietf:params:acme:error:dns","detail":"a is bad",
"identifier":{"type":"dns","value":"a.example"}},{"detail":"b is bad",
"identifier":{"type":"dns","value":"b.example"}},null,7]')"
refuses 'unauthorized' "$no" "$(problem unauthorized ',"subproblems":null')"
refuses 'unauthorized' "$no" "$(problem unauthorized ',"subproblems":[]')"
refuses 'ES384' '400 Bad Request' "$(problem badSignatureAlgorithm \
    ',"detail":"x","algorithms":["RS256","ES384"]')"
refuses 403 "$no" '<html>no</html>'
refuses 403 "$no" ''
refuses 403 "$no" '[]'
refuses 404 '404 Not Found' 'none'
check 'no control character of the CA reaches the terminal' '
	answer POST_it "$no" "$(problem x ",\"detail\":\"\\\\u001b[31m\\\\n\
acme-step: all is well\\\\u0000\\\\u009b\\\\u007f\\\\u202e\\\\u2028end\"")"
	grep u001b www/POST_it || exit
	get it >out 2>err; got=$?
	cat err; [ $got = 77 ] && [ ! -s out ] && grep end err &&
	is 1 "wc -l <err" && ! LC_ALL=C grep "[[:cntrl:]]" err &&
	! LC_ALL=C grep "$(printf "\302\233\|\342\200")" err'
check 'nor what stands in its headers' '
	printf "HTTP/1.1 403 \033[31mNo\r\nContent-Length: 0\r\n\r\n" \
	    >www/POST_it
	get it >out 2>err; got=$?
	cat err; [ $got = 76 ] && is 1 "wc -l <err" &&
	! LC_ALL=C grep "[[:cntrl:]]" err'

# shortly WORDS CODE...: it fails with the words, in one line of at most 2000
# bytes on standard error, and of not much more in the pipe.
shortly() {
	words=$1; shift
	check "a short message, $words: $*" "{ $*; } 2>err | cat >piped
	    head -c 3000 err; head -c 3000 piped
	    grep -q -e '$words' err && is 1 'wc -l <err' &&
	    [ \$(wc -c <err) -le 2001 ] && [ \$(wc -c <piped) -lt 2100 ] &&
	    { [ ! -s piped ] || grep -q '^failed .*$words' piped; }"
}
# count N TEXT: the text N times, with commas between.
count() { yes "$2" | head -n "$1" | tr '\n' , | sed 's/,$//'; }
long=$(head -c 90000 /dev/zero | tr '\0' x)
error newOrder userActionRequired ",\"detail\":\"$long\""
shortly 'xxx\.\.\.; .*-y' new_order
error newOrder malformed ',"detail":"must agree to terms of service"'
dies 77 '; agree to its terms of service with new-account -y' new_order
meta '"meta":{"termsOfService":"https://a.example/terms"}'
error newAccount userActionRequired ''
dies 77 'new-account -y: https://a.example/terms$' \
    'step new-account -d "$ca/dir"'
error revoke alreadyRevoked ',"detail":"x"'
check 'what is revoked already is as it was asked for' '
	step revoke-cert -d "$ca/dir" -a account server.pem >out 2>err
	got=$?; cat out err; [ $got = 0 ] && [ ! -s out ] &&
	is 1 "grep -c \"server.pem is already revoked\" err"'
error revoke accountDoesNotExist ''
dies 77 'DoesNotExist$' \
    'step revoke-cert -d "$ca/dir" -K server.key server.pem'
answer POST_newAccount '200 OK' '{"status":"valid","orders":"/orders"}' \
    "Location: $ca/account/1"
error orders unauthorized ''
check 'an account whose orders cannot be read is printed' '
	step account -d "$ca/dir" >out 2>err; got=$?
	cat out err; [ $got = 0 ] && grep "^account $ca/account/1" out &&
	grep "warning: cannot read the account.s orders: .*unauth" err'
rm www/POST_newAccount
error newOrder "$long" ",\"detail\":\"short\""
shortly 'xxx\.\.\.: short' new_order
error newOrder userActionRequired ",\"subproblems\":[$(count 1000 \
    '{"detail":"bad","identifier":{"type":"dns","value":"x.example"}}')]"
shortly 'x.example: : bad, and 9[0-9]* more; .*-y' new_order
error newOrder compound ",\"subproblems\":[{\"detail\":\"$long\"},{}]"
shortly 'xxx\.\.\.; ' new_order
error newOrder badSignatureAlgorithm \
    ",\"algorithms\":[$(count 500 '"ES384"')]"
shortly 'key -t ec384), and 4[0-9]* more; ' new_order
meta "\"meta\":{\"profiles\":{$(seq -s , 1000 |
    sed 's/[0-9]\{1,\}/"profile-&":"x"/g')}}"
shortly ', and 9[0-9]* more' \
    'step new-order -p none -d "$ca/dir" -a account a.example'
shortly xxx 'step new-order -a account "$long"'
shortly xxx '"$acme" thumbprint -k "$long"'
check 'nor is one that is handed on' '
	{ printf "failed 77 x %s\n" "$long"; cat record; } | step order |
	cat >piped; grep "^failed 77 x xxx.*xxx\.\.\.$" piped &&
	[ "$(wc -c <piped)" -lt 2100 ]'
euro=$(printf '\342\202\254')
error newOrder malformed ",\"detail\":\"$(echo "$long" | cut -c -999 |
    sed "s/x/$euro/g")\""
shortly "$euro"'\.\.\.$' new_order

group 'ACME: challenges'

sed 's/ready/pending/' record >pending
token=LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0
# authz MEMBERS...: an authorization with one challenge of these.
authz() {
	answer POST_authz '200 OK' '{"status":"pending","identifier":
{"type":"dns","value":"a.example"},"challenges":[{"type":"tls-sni-09","x":1},
{'"$1"',"url":"'"$ca"'/chall"}]}'
}
challenges() { step challenges "$@" <pending; }
# challenge LINE [OPTION]: such a line is what it finds.
challenge() {
	check "challenge $1" "challenges ${2-} >out; got=\$?; cat out
	    [ \$got = 0 ] && grep -Fqx -e 'challenge $1' out"
}
fresh
print=$(oracle account.key)
digest=$(printf %s "$token.$print" | openssl dgst -sha256 -binary | base64url)
hash=$(printf %s "$token.$print" | openssl dgst -sha256 | sed 's/.* //')
authz '"type":"http-01","status":"pending","token":"'$token'"'
challenge "http-01 dns a.example $ca/chall $token $token.$print"
authz '"type":"http-01","token":"'$token'"'
challenge "http-01 dns a.example $ca/chall $token $token.$print"
authz '"type":"dns-01","token":"'$token'"'
challenge "dns-01 dns a.example $ca/chall _acme-challenge.a.example $digest"
authz '"type":"tls-alpn-01","token":"'$token'"'
challenge "tls-alpn-01 dns a.example $ca/chall a.example $hash"
authz '"type":"http-01","token":"-'$token'"'
challenge "http-01 dns a.example $ca/chall -$token -$token.$print"
authz '"type":"dns-persist-01","issuer-domain-names":["ca.example"]'
check 'a challenge without a token ends nothing' \
    'challenges >out; got=$?; cat out; [ $got = 0 ]'
authz '"type":"http-01","token":"../x"},{"type":"dns-01","token":"'$token'"'
challenge "dns-01 dns a.example $ca/chall _acme-challenge.a.example $digest" \
    '-t dns-01'

for evil in ../../etc/passwd a/b a.b 'a b' '' / .. a+b a= 'a\u0000b' \
    'a\nchallenge' 'a\u002f' "$(head -c 5000 /dev/zero | tr '\0' x)"; do
	authz '"type":"http-01","token":"'"$evil"'"'
	dies 76 token ": '${evil%xxxx*}'; challenges"
	mkdir -p webroot
	dies 76 token ": '${evil%xxxx*}'; step respond -w webroot \
-t http-01 <pending"
done
check 'no file came of them' '[ -z "$(ls -A webroot)" ]'
for evil in 7 null '["x"]'; do
	authz '"type":"http-01","token":'"$evil"
	dies 76 token ": '$evil'; challenges"
done
for text in '' '[]' 'null' '{}' '{"status":"pending"}' '{"status":7}' \
    '{"status":"pending","challenges":{}}'; do
	answer POST_authz '200 OK' "$text"
	dies 76 . ": '$text'; challenges"
done
for value in '"a\nb"' '"a b"' 7 '""'; do
	answer POST_authz '200 OK' '{"status":"pending","identifier":{
"type":"dns","value":'"$value"'},"challenges":[{"type":"http-01",
"url":"'"$ca"'/chall","token":"'$token'"}]}'
	dies 76 . ": '$value'; challenges"
done
for url in 7 null '"http://localhost/c"' '"https://localhost/\nx"' '"x"'; do
	answer POST_authz '200 OK' '{"status":"pending","identifier":{
"type":"dns","value":"a.example"},"challenges":[{"type":"http-01",
"url":'"$url"',"token":"'$token'"}]}'
	dies 76 . ": '$url'; challenges"
done

fresh
authz '"type":"http-01","status":"pending","token":"-'$token'"'
answer POST_order "200 OK" "$(order pending)"
answer POST_order.9 "200 OK" "$(order ready)"
runs POST_chall "cp ../webroot/-$token . 2>seen; cat POST_plain
	cp POST_ready POST_order"
answer POST_plain '200 OK' \
    '{"type":"http-01","status":"processing","url":"x"}'
answer POST_ready '200 OK' "$(order ready)"
check 'respond publishes a token with a dash, and takes it down' '
	step respond -t http-01 -w webroot <pending >out && cat out &&
	grep -qx "status ready" out &&
	is "-$token.$print" "cat www/-$token" &&
	[ -z "$(ls -A webroot)" ]'
fresh
authz '"type":"http-01","status":"pending","token":"'$token'"'
answer POST_chall '200 OK' '{"type":"http-01","status":"processing"}'
answer POST_order '200 OK' "$(order invalid)"
answer POST_authz.2 '200 OK' '{"status":"invalid","identifier":{"type":"dns",
"value":"a.example"},"challenges":[{"type":"http-01","status":"invalid",
"url":"'"$ca"'/chall","token":"'$token'","error":{"type":
"urn:ietf:params:acme:error:connection","detail":"we saw \u001b[31mnothing"
}}]}'
cp www/POST_authz.2 www/POST_authz.3
dies 77 'a.example.*nothing$' 'step respond -t http-01 -w webroot <pending'
mkdir acme-challenge
# These are of the same length.
sed -i 's/error:connection/error:unauthorized/; s/we saw/we s/' \
    www/POST_authz.[23]
for dir in webroot acme-challenge/; do
	words="files were in ${dir%/}"
	[ $dir != webroot ] || words="$words, which must .*/acme-challenge/$"
	[ $dir = webroot ] || words="$words$"
	rm -f www/requests
	dies 77 "nothing; the $words" \
	    "step respond -t http-01 -w $dir <pending"
done
check 'and nothing stays published' '[ -z "$(ls -A webroot)" ]'

group 'a CA speaks for itself alone'

# auth NAME STATUS CHALLENGES: an authorization for a.example.
auth() {
	answer "POST_$1" '200 OK' '{"status":"'"$2"'","identifier":{
"type":"dns","value":"a.example"},"challenges":['"$3"']}'
}
# one TYPE [MEMBERS]: one of its challenges.
one() {
	printf '{"type":"%s","url":"%s","token":"%s"%s}' "$1" "$ca/chall" \
	    "$token" "${2-}"
}
# strays WORDS CODE...: refused as a broken reply that names both origins,
# before anything is signed.
strays() {
	rm -f www/requests
	dies 76 "$ca.*$other$1" "$2"
	check 'and nothing was signed for it' '
		cat www/requests; not grep -c "POST_victim" www/requests'
}
fresh
for name in newNonce newAccount newOrder newAuthz keyChange revokeCert; do
	for command in directory 'new-account -y'; do
		[ "$command$name" != "new-account -y$name" ] ||
		    case $name in newNonce|newAccount) ;; *) continue ;; esac
		answer GET_dir '200 OK' "$(printf %s \
		    "{\"newAuthz\":\"$ca/newAuthz\",${directory#?}" |
		    sed "s|\"$name\":\"[^\"]*\"|\"$name\":\"$other/victim\"|")"
		strays /victim ": $name; step $command -d $ca/dir"
	done
done
check 'not even an account was asked for' '
	not grep -c POST www/requests'
fresh
answer POST_newAccount "$created" '{"status":"valid"}' \
    "Location: $other/victim"
strays /victim 'step new-account -d "$ca/dir" -y'
strays /victim 'step account -d "$ca/dir" -D'
strays /victim 'step new-order -d "$ca/dir" a.example'
for where in authz order finalize certificate; do
	fresh
	answer POST_newOrder "$created" "$(order ready "$(
		printf '"certificate":"%s"' "$ca/certificate")" |
	    sed "s|$ca/$where|$other/victim|")" "Location: $(
	    echo "$ca/order" | sed "s|$ca/$where|$other/victim|")"
	strays /victim ": $where; new_order"
done
fresh
authz '"type":"http-01","token":"'$token'"'
sed -i "s|$ca/chall|$other/victim|" www/POST_authz
sed -i 's/^Content-Length.*/Connection: close\r/' www/POST_authz
: >www/POST_authz.close
strays /victim 'challenges'
strays /victim 'step respond -w webroot <pending'
fresh
answer POST_certificate '200 OK' "$(cat server.pem)" \
    "Link: <$other/victim>;rel=\"alternate\""
answer POST_order '200 OK' \
    "$(order valid "\"certificate\":\"$ca/certificate\"")"
{ sed 's/ready/valid/; s/a.example/localhost/' record
echo "certificate $ca/certificate"; } >valid
strays /victim 'step certificate -i nobody <valid'
answer POST_newAccount '200 OK' \
    '{"status":"valid","orders":"'"$other/victim"'"}' "Location: $ca/account/1"
strays /victim 'step account -d "$ca/dir"'
answer POST_newAccount '200 OK' \
    '{"status":"valid","orders":"'"$ca/orders"'"}' "Location: $ca/account/1"
answer POST_orders '200 OK' '[]' "Link: <$other/victim>;rel=\"next\""
strays /victim 'step account -d "$ca/dir"'
# Lines that an earlier step let pass, or that a script has changed.
for word in account order authorization finalize certificate; do
	{ grep -v -e "^$word" -e '^status' pending
	echo status pending; echo "$word $other/victim"; } >stray
	case $word in
	account)	continue ;;
	order)		command=order ;;
	authorization)	command=challenges ;;
	finalize)	command='finalize -K leaf.key'
			sed -i 's/^status.*/status ready/' stray ;;
	certificate)	command=certificate
			sed -i 's/^status.*/status valid/' stray ;;
	esac
	strays /victim "step $command <stray"
done
dies 64 "$other.*$ca" 'step get -a account "$other/victim"'
dies 64 "$other.*$ca" 'echo {} | step post -a account "$other/victim"'
dies 64 "$ca" 'step get -a account "https://localhost/victim"'

# Only an authorization is deactivated, and only by the CA that was named.
fresh
answer POST_authz '200 OK' '{"status":"valid","contact":[]}'
dies 76 identifier 'step deactivate-authz <record'
answer POST_authz '200 OK' '{"status":"valid","identifier":
{"type":"dns","value":"a.example"}}'
dies 76 challenges 'step deactivate-authz <record'
auth authz valid "$(one http-01)"
check 'an authorization is deactivated' '
	rm -f www/requests
	step deactivate-authz <record >out && cat out &&
	is "{\"status\":\"deactivated\"}" \
	    "part www/body.POST_authz.2 payload | from_base64url"'
sed "s|^directory .*|directory $other/dir|" record >via
dies 76 "$other/dir redirects to another origin, $ca" \
    'step deactivate-authz <via'
raw GET_old "HTTP/1.1 302 X\r\nLocation: $other/dir2\r
Content-Length: 0\r\n\r\n"
answer GET_dir2 '200 OK' "$(printf %s "$directory" | sed "s|$ca|$other|g")"
answer POST_newAccount '200 OK' '{"status":"valid"}' \
    "Location: $other/account/1"
check 'a redirect: an account can be there' '
	step new-account -d "$ca/old" >out && cat out &&
	grep -x "directory $ca/old" out &&
	grep -x "account $other/account/1" out'
answer POST_newOrder "$created" "$(order ready | sed "s|$ca|$other|g")" \
    "Location: $other/order"
check 'a redirect: and an order, by the record of the account' '
	step new-order -a out a.example >out2 && cat out2 &&
	grep -x "order $other/order" out2'
for option in -D '-m mailto:a@b.example'; do
	dies 76 "$ca/old redirects to another origin, $other" \
	    "step account -d '$ca/old' $option"
done
dies 76 "$ca/old redirects to another origin, $other" \
    'step key-change -d "$ca/old" -K leaf.key'
answer GET_dir2 '200 OK' "$directory"
dies 76 "$other.*$ca/new" 'step new-account -d "$ca/old"'

# What the user allows, in the account's record.
fresh
{ cat account; echo "origin $other"; } >wide
answer POST_newOrder "$created" "$(order ready |
    sed "s|$ca/finalize|$other/finalize|")" "Location: $other/order"
answer POST_order '200 OK' "$(order ready |
    sed "s|$ca/finalize|$other/finalize|")"
check 'an origin that the account'\''s record allows' '
	step new-order -a wide a.example >out && cat out &&
	grep -x "order $other/order" out &&
	grep -x "finalize $other/finalize" out &&
	grep -x "origin $other" out'
check 'it goes from step to step, once' '
	step order -a wide <out >out2 && cat out2 &&
	is 1 "grep -c \"^origin $other\$\" out2"'
answer GET_dir '200 OK' "$(printf %s "$directory" |
    sed "s|$ca/newAccount|$other/newAccount|")"
answer POST_newAccount '200 OK' '{"status":"valid"}' \
    "Location: $other/account/1"
check 'new-account reads it, and keeps it' '
	echo "origin $other" >early
	step new-account -a early -d "$ca/dir" >out && cat out &&
	grep -x "account $other/account/1" out && grep -x "origin $other" out'
dies 65 'early, line 1' 'echo "origin http://x/" >early
	step new-account -a early -d "$ca/dir"'
check 'also on standard input' '
	echo "origin $other" | step new-account -a - -d "$ca/dir" >out &&
	cat out && grep -x "origin $other" out'
dies 76 "$other" 'step new-account -a none -d "$ca/dir"'
dies 76 "$other" ': >early; step new-account -a early -d "$ca/dir"'
fresh
answer GET_dir '200 OK' "${directory%\}},\"renewalInfo\":\"$other/ari\"}"
dies 77 "$other/ari.*404" \
    ': renewalInfo may be elsewhere; step renewal-info -d "$ca/dir" server.pem'

group 'authorizations are for the names of the order'

# An authorization is for one of the order's names.
# other_name TYPE VALUE [MEMBER]: the CA says that it is for this one.
other_name() {
	answer POST_authz '200 OK' '{"status":"pending","identifier":{
"type":"'"$1"'","value":"'"$2"'"}'"${3-}"',"challenges":['"$(one http-01)"',
'"$(one dns-01)"',{"type":"dns-persist-01","url":"'"$ca/chall"'",
"issuer-domain-names":["ca.example"]}]}'
}
cat >asked <<'END'
#!/bin/sh
echo "$@" >>asked.for
END
chmod 755 asked
fresh
answer POST_chall '200 OK' '{"status":"processing","token":"'"$token"'"}'
answer POST_order '200 OK' "$(order ready)"
while read -r type value member; do
	other_name "$type" "$value" "$member"
	dies 76 'another name' ": $type $value $member; challenges"
	for kind in http-01 dns-01 dns-persist-01; do
		dies 76 'another name' ": $type $value $member
		    step respond -t $kind -x ./asked <pending"
	done
	dies 76 'another name' ": $type $value $member
	    step deactivate-authz <pending"
done <<END
dns bank.example
dns example
dns b.a.example
dns a.example ,"wildcard":true
dns *.a.example
ip 192.0.2.1
END
check 'and no hook was called' '! [ -e asked.for ]'
other_name dns A.Example
check 'in any case' 'challenges -t http-01 | grep "http-01 dns a.example"'
sed 's/^identifier.*/identifier dns *.a.example/' pending >wild
for member in ',"wildcard":true' ''; do
	other_name dns a.example "$member"
	check "a wildcard${member:+, said to be one}" '
		step challenges -t dns-persist-01 <wild >out && cat out &&
		grep "dns \*.a.example .*_validation-persist.a.example \
ca.example; .*policy=wildcard$" out'
done
sed '/^identifier/d' pending >nameless
dies 65 identifier 'step challenges -t http-01 <nameless'

# persist ISSUER ACCOUNT [RECORD]: what a TXT record would say for good.
fresh
persist() {
	authz '"type":"dns-persist-01","issuer-domain-names":["'"$1"'"]'
	sed "s|^account .*|account $2|" pending >persist.record
}
for issuer in 'ca.example; x=y' 'ca.example;' 'ca example' '*.ca.example' ''
do
	persist "$issuer" "$ca/account/1"
	dies 76 issuer-domain-names ": '$issuer'
	    step challenges <persist.record"
done
persist ca.example "$other/account/666666"
dies 76 "$ca.*$other" 'step challenges <persist.record'
persist ca.example "$ca/account;policy=wildcard"
dies 76 'account' 'step challenges <persist.record'
persist ca.example "$ca/account/1"
check 'a dns-persist-01 challenge as it should be' '
	step challenges <persist.record >out && cat out &&
	grep " _validation-persist.a.example ca.example; \
accounturi=$ca/account/1$" out'

group 'responders: what is said before anything is told'

# answering NAME HOST:PORT RECORD [COMMAND...]: respond -l, until it is
# killed.
answering() {
	job=$1 where=$2 rec=$3
	shift 3
	"$@" "$acme" respond -C root.pem -k "${own_key:-account.key}" \
	    -T 900 -s 800 -l "$where" <"$rec" >"$job.out" 2>"$job.err" &
	pids="$pids $!"
	echo $! >"$job.pid"
	await listening "${where##*:}"
	await sh -c "cat /proc/*/stat 2>/dev/null | grep ') [A-Z] $! '"
	cat /proc/[0-9]*/stat 2>/dev/null |
	sed -n "s/^\([0-9]*\) .*) [A-Z] $! .*/\1/p" >"$job.child"
}
# most NAME: the most KiB of memory that it ever had.
most() { sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' \
    "/proc/$(cat "$1.child")/status"; }
# frugal NAME: the process that answers lives, and has kept to its memory.
frugal() {
	most=$(most "$1") && echo "$most KiB" && case $acme in
	*-san|*-cov)	;;
	*)	[ "$most" -lt 6000 ] ;;
	esac
}
# ended NAME SIGNAL STATUS: the step ends so, and its responder with it.
ended() {
	kill "-$2" "$(cat "$1.pid")"
	wait "$(cat "$1.pid")"
	got=$?
	check "$1: SIG$2 ends the step and what answers for it" '
	    echo "status $got"; [ "$got" = "'"$3"'" ] &&
	    await eval "! kill -0 $(cat '"$1"'.child)" && ! [ -s '"$1"'.out ]'
}

cat >peer.c <<'END'
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
static const char *request = "";
static int port;
static int
dial(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in a = { AF_INET, htons(port) };
	struct timeval t = { 20, 0 };

	a.sin_addr.s_addr = htonl(0x7f000001);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
	if (connect(fd, (void *)&a, sizeof a) != 0)
		perror("connect"), exit(1);
	return fd;
}
/* At once: all connect, wait, ask; every one must be answered. */
static void
burst(int n)
{
	int *fd = calloc(n, sizeof *fd), good = 0;
	char b[4096];

	for (int i = 0; i < n; i++)
		fd[i] = dial();
	usleep(300000);
	for (int i = 0; i < n; i++)
		write(fd[i], request, strlen(request));
	for (int i = 0; i < n; i++)
		good += read(fd[i], b, 12) == 12 &&
		    memcmp(b, "HTTP/1.1 200", 12) == 0;
	printf("%d of %d\n", good, n);
	exit(good != n);
}
/* One after another: they say something, and stay; the last 300 do. */
static void
flood(int n)
{
	int fd[300] = { 0 };

	signal(SIGPIPE, SIG_IGN);
	for (int i = 0; i < n; i++) {
		if (fd[i % 300])
			close(fd[i % 300]);
		fd[i % 300] = dial();
		write(fd[i % 300], request, i % 7 * strlen(request) / 7);
		if (i % 3 == 0)
			shutdown(fd[i % 300], SHUT_WR);
	}
}
/* One, who says something, and then nothing: until he is dropped. */
static void
patient(int n)
{
	int fd = dial();
	char b[4096];

	write(fd, request, strlen(request));
	while ((n = read(fd, b, sizeof b)) > 0)
		write(1, b, n);
	exit(n < 0 && errno == EAGAIN);
}
int
main(int argc, char **argv)
{
	port = atoi(argv[2]);
	request = argv[4];
	(*argv[1] == 'b' ? burst : *argv[1] == 'f' ? flood : patient)(
	    atoi(argv[3]));
	return 0;
}
END
check 'peers' '${CC:-cc} -w peer.c -o peer'

# asked COUNT: so many challenges were told to the CA.
asked() { [ "$(grep -c POST_chall www/requests)" = "$1" ]; }
fresh
: >www/requests
{ cat pending; echo "challenge http-01 dns a.example $ca/chall $token \
$token.$print"; } >http.rec
for where in '' x 0 65536 99999999999999999999 127.0.0.1: :x \
    127.0.0.1:0 '[::1]' '[::1:80'; do
	dies 64 'HOST:.PORT' "step respond -l '$where' <http.rec"
done
dies 64 'HOST:.PORT' 'step respond -l "$(printf %0256d 1):80" <http.rec'
dies 73 '1.2.3.4.5:80' 'step respond -l 1.2.3.4.5:80 <http.rec'

group 'responders: the address of -l'

# -l HOST, in the network with a name server of its own.
listens_at() {
	host=$1; shift
	inside_net "$acme" respond -C root.pem -k account.key -T 4 \
	    -l "$host.names.test:8080" "$@" <http.rec
}
# has_place -4|-6|-v HOST PLACE...: it listens at these alone, as
# /proc/net/tcp has them.
has_place() {
	rm -f seen
	listens_at "$2" -P 'cat /proc/net/tcp /proc/net/tcp6 >seen' "$1"
	shift 2
	awk '$4 == "0A" && /:1F90/ { print $2 }' seen >places
	cat places
	for place; do echo "$place:1F90"; done | diff - places
}
own_v4=0200007F own_v6=00000000000000000000000001000000
for kind in servfail refused nxdomain silent none; do
	search 'options timeout:1'
	check "-l: no address of IPv6: $kind" 'has_place -v live-$kind $own_v4'
	check "-l: no address of IPv4: $kind" 'has_place -v $kind-live $own_v6'
done
for option in -v -4 -6; do
	check "-l: addresses of both families, with $option" '
	    has_place $option live-live $own_v4 $own_v6'
done
search 'search broken.test' 'options ndots:5'
check '-l: a name with a dot is not searched' 'has_place -v live-none $own_v4'
check '-l: a name of /etc/hosts' 'has_place -v hosted $own_v4'
check '-l: the first address of two of a family' 'has_place -v twice $own_v4'
search
dies 73 'limit of 1 s reached while looking up the address of silent-silent' \
    'listens_at silent-silent -T 1'
check '-l: no process that looks a name up outlives the step' '
    not pgrep -f "^$acme respond .*silent-silent"'
dies 73 'cannot listen on nxdomain-nxdomain.names.test:8080: Name' \
    'listens_at nxdomain-nxdomain'

dies 64 ': -w DIR, -l ADDR and -x HOOK cannot be combined' \
    'step respond -l 1 -w webroot <http.rec'
dies 64 ': -w DIR, -l ADDR and -x HOOK cannot be combined' \
    'step respond -l 1 -x true <http.rec'
dies 64 'style: acmesh; there are dehydrated uacme lego certbot' \
    'step respond -x acmesh:x <http.rec'
printf '#!/bin/sh\n' >not-run
dies 73 'hook ./not-run: .*(chmod +x)' 'step respond -x ./not-run <http.rec'
for name in not-run no-such-hook; do
	dies 73 "hook $name: not found in PATH; a file in this directory is\
 named with ./$" "step respond -x $name <http.rec"
done
dies 73 'hook not-run: Permission denied; .*(chmod +x)' \
    'PATH=$PWD:$PATH; step respond -x not-run <http.rec'
for name in './no prog' 'no prog'; do
	dies 73 "hook $name: No such file.*without arguments" \
	    "step respond -x '$name' <http.rec"
done
dies 73 'hook ./none: No such file' \
    'step respond -x certbot:true,./none <http.rec'
dies 73 "listen on 127.0.0.1:$home: .*; stop the program" \
    "step respond -l 127.0.0.1:$home <http.rec"

group 'files that are not records'

# taken FILE WHAT: it is not taken for a record.
taken() { dies 65 "standard input is $2, not a record; " "step order <$1"; }
openssl req -new -key account.key -subj / >request.pem
{ printf '\357\273\277'; cat server.pem; } >marked.pem
sed 's/$/\r/' server.pem >crlf.pem
openssl x509 -in server.pem -text >text.pem
openssl x509 -in server.pem -outform DER >server.der
for name in server marked crlf text; do
	taken $name.pem 'a certificate'
done
taken request.pem 'a certificate request'
taken account.key 'a key'
taken server.der 'a DER file'
dies 65 'account.key is a key, not a record; -a takes the output of new-acc' \
    'step new-order -a account.key a.example'
dies 65 'server.pem is a certificate, not a record; -a takes' \
    'step new-order -a server.pem a.example'
# by_hand: a record is typed once the program says that it waits for it.
by_hand() {
	: >typed
	echo 'acme-step order -k account.key; echo "status $?"' >by-hand.sh
	{ await grep terminal typed; printf 'failed 75 x y\n\004'; } |
	socat -t 10 - 'EXEC:sh by-hand.sh,pty,setsid,ctty,stderr' >typed
}
check 'a record that is read from a terminal: that is said first, once' '
    by_hand; cat typed; grep "status 75" typed &&
    is 1 "grep -c \"^acme-step: order: reading a rec.* terminal\" typed"'
check 'and only then' '
    { ! step order <pending; } 2>err; cat err
    not grep terminal err'

group 'responders: options that do not fit'

dies 64 ' -n ' 'step respond -l 1 -n <http.rec'
dies 64 '-l needs -t' 'step respond -l 1 <pending'
types='http-01 dns-01 tls-alpn-01 dns-account-01 dns-persist-01'
dies 64 "no such challenge type: tls-sni-01; there are $types (see" \
    'step challenges -t tls-sni-01 <pending'
dies 64 "no such challenge type: tls-sni-01; there are $types (see" \
    'step respond -t tls-sni-01 -l 1 <pending'
dies 64 '-l cannot answer sky-01 challenges, only: http-01 .*persist-01 (see' \
    '{ cat pending; echo "challenge sky-01 dns a.example $ca/c x y"; } |
    step respond -l 1'
reasons=$(sed -n '/^    revoke-cert/,/CAs take/p' "$src/README" |
    tr -d ' \n' | sed 's/.*5.3.1://; s/([0-9]*)//g; s/\..*//; s/,/ /g')
for reason in mistake certificatehold 7 - 11 -1 ''; do
	dies 64 "no such reason: $reason; there are $reasons (see" \
	    "step revoke-cert -c '$reason' server.pem"
done
dies 73 "cannot listen on 127.0.0.1:$home: .*in use" \
    'step respond -l 127.0.0.1:$home <http.rec'
dies 73 "cannot listen on $home: .*in use" 'step respond -l $home <http.rec'
dies 73 'cannot listen on 192.0.2.1:5: ' \
    'step respond -l 192.0.2.1:5 <http.rec'
if [ "$(cat /proc/sys/net/ipv4/ip_unprivileged_port_start)" -gt 1 ] &&
    [ "$(id -u)" = 0 ]; then
	cp "$acme" free.bin && chmod 755 . free.bin && chmod 644 account.key
	dies 73 'cannot listen on 1: .*denied' '
	    setpriv --reuid=65534 --regid=65534 --clear-groups ./free.bin \
	    respond -C root.pem -k account.key -l 1 <http.rec 2>all; got=$?
	    grep -v warning all >&2; exit $got'
	rm -f free.bin; chmod 600 account.key
fi
check 'and nothing was told' 'asked 0'
check 'an order that is ready passes, whatever was to be published' '
    step respond -l "$home" <record | diff record - &&
    step respond -x nowhere <record | diff record - &&
    step respond -w nowhere <record | diff record -'

group 'responders: -w'
for kind in 'ln -s ../account.key' 'echo x >' 'mkdir' 'mkfifo' \
    'ln -s nowhere' 'ln -s /dev/null' 'printf %sx "$token.$print" >'; do
	check "it leaves what is there as it is: $kind" '
	    rm -rf w; mkdir w
	    (cd w && eval "$kind $token") && ls -l w >before
	    cp account.key key.before
	    step respond -w w <http.rec 2>err; got=$?
	    cat err; ls -l w | diff before - && cmp account.key key.before &&
	    [ $got = 73 ] && grep "cannot create $token in w" err'
done
dies 73 'its file system would not let the web server read it' '
    rm -rf w; mkdir w; umask 077; FAULT="chmod refused" ./faulty respond \
	-T 5 -C root.pem -k account.key -w w <http.rec'
check 'and nothing was told' 'asked 0'
check 'but what a crash has left, which says the same' '
    rm -rf w; mkdir w
    printf %s "$token.$print" >"w/$token"
    step respond -w w <http.rec 2>err; got=$?
    cat err; ! asked 0 && [ $got != 0 ] && ls -A w | diff /dev/null -'

fresh
answer POST_plain '200 OK' '{"type":"http-01","status":"processing"}'
answer POST_order '200 OK' "$(order ready)"
# authorized NAME MEMBERS: an authorization with one challenge of these.
authorized() {
	answer "POST_$1" '200 OK' '{"status":"'"$2"'","identifier":{"type":
"dns","value":"'"$3"'"},"challenges":[{"type":"http-01","status":"'"$4"'",
"url":"'"$ca/chall"'","token":"'"$5"'"}]}'
}
# What the CA is told, and what it finds then.
runs POST_chall 'rm -f seen; cp -p ../w/* seen; ls -A ../w >names
    cat POST_plain'
for left in '' "$(printf %s "$token.$print" | head -c 60)" "$token.$print"
do
	check "but a leftover is taken over: '$left'" '
	    rm -rf w; mkdir w; (umask 077; printf %s "$left" >"w/$token")
	    step respond -w w <http.rec >out; got=$?
	    cat out; ls -l www/seen; [ $got = 0 ] &&
	    grep -x "status ready" out && is "$token.$print" "cat www/seen" &&
	    is 644 "stat -c %a www/seen" && is "$token" "cat www/names" &&
	    ls -A w | diff /dev/null -'
done
# killed RECORD: a run that is killed as soon as it has told the CA.
killed() {
	runs POST_chall 'kill -9 "$(cat ../killed.pid)"'
	rm -rf w; mkdir w
	sh -c 'echo $$ >killed.pid; exec "$@"' sh "$acme" respond \
	    -C root.pem -k account.key -w w <"$1" >out
	[ $? = 137 ] && is "$token.$print" "cat w/$token" &&
	rm -f www/requests
}
# cleaned RECORD: the same command, when nothing is pending any more.
cleaned() {
	step respond -w w <"$1" >out; got=$?
	cat out; ls -lA w; cat www/requests
	[ "$got" = 0 ] && grep -x "status ready" out && [ -z "$(ls -A w)" ]
}
# The other file is of another order, which may be pending yet.
authorized authz pending a.example pending "$token"
check 'after a kill the same command cleans up: the order is ready' '
    killed pending && authorized authz valid a.example valid "$token" &&
    cleaned pending && not asked 1'
check 'so it does where the record says so, and names the challenges' '
    { cat record; grep ^challenge http.rec; } >named.rec
    killed http.rec && cleaned named.rec && [ ! -e www/requests ] &&
    printf %s "$token" >"w/$token" && cleaned named.rec'
check 'and where the record says so alone' '
    killed http.rec && authorized authz valid a.example valid "$token" &&
    cleaned record'
check 'and what it does not say is fetched, but for what the CA refuses' '
    answer POST_order "200 OK" "$(order ready |
	sed "s|\"$ca/authz\"|\"$ca/withheld\",&|")" &&
    answer POST_withheld "403 Forbidden" "$(problem unauthorized)" &&
    killed http.rec && grep -v -e ^authorization -e ^identifier record >short
    cleaned short; got=$?; answer POST_order "200 OK" "$(order ready)"
    [ $got = 0 ] && grep withheld www/requests'
check 'it asks for nothing where there is nothing' '
    rm -f www/requests; echo x >w/x; : >w/y; step respond -w w <record |
    diff record - && [ ! -e www/requests ] && [ -e w/x ] && [ -e w/y ]'
check 'it leaves what is of another order, or says something else' '
    rm -rf w; mkdir w
    printf %s "other.$print" >w/other; printf %s "$token.+" >"w/$token"
    step respond -w w <record >out && cat out && ls w &&
    [ -e w/other ] && [ -e "w/$token" ]'
check 'one name is valid, the other pending' '
    { cat pending; echo "authorization $ca/authz2"
    echo "identifier dns b.example"; } >two.names
    rm -rf w www/requests; mkdir w; printf %s "$token.$print" >"w/$token"
    authorized authz2 pending b.example pending "of-b"
    runs POST_chall "ls -A ../w >names; cat POST_plain"
    answer POST_order "200 OK" "{\"status\":\"ready\"}"
    cleaned two.names; got=$?
    answer POST_order "200 OK" "$(order ready)"
    [ $got = 0 ] && asked 1 && is of-b "cat www/names"'
authorized authz invalid a.example invalid "$token"
check 'an order that has failed meanwhile' '
    rm -rf w; mkdir w; printf %s "$token.$print" >"w/$token"
    step respond -w w <pending 2>err; got=$?
    cat err; [ $got = 77 ] && [ -z "$(ls -A w)" ]'
answer POST_order '200 OK' "$(order pending)"
answer POST_chall '200 OK' '{"type":"http-01","status":"processing"}'
check 'which a pending order does not say: in a box at the fourth look' '
    rm -rf box w www/requests; mkdir w
    for _ in $(seq 20); do
	step respond -B box -w w <http.rec 2>err; [ $? = 75 ] || break
	"$acme" send -C root.pem box || exit
    done
    cat err; cat www/requests; grep "a.example.*invalid" err &&
    is 4 "grep -c ^POST_order www/requests" && [ -z "$(ls -A w)" ]'
fresh
: >www/requests

group 'responders: -w, and standard error that is full'

# milliseconds: since 1970.
milliseconds() { echo $(($(date +%s%N) / 1000000)); }
# stuck_respond: start respond -w, as $job and $pid, where standard error
# is a full pipe, and wait until it has published.
stuck_respond() {
	rm -rf w; mkdir w
	clogged 2 "$acme" respond -C root.pem -k account.key -s 200 -w w \
	    <http.rec & job=$!
	await test -e "w/$token" && pid=$(cat stuck.pid)
}
# stuck_ends STATUS MAX: it ends so, within so many milliseconds.
stuck_ends() {
	start=$(milliseconds)
	{ sleep 20; kill -KILL "$pid"; } 2>/dev/null & killer=$!
	wait "$job"
	got=$? took=$(($(milliseconds) - start))
	kill "$killer"
	echo "status $got, after $took ms"
	[ "$got" = "$1" ] && [ "$took" -lt "$2" ]
}
check 'a full pipe at standard error: what was published goes at once' '
    stuck_respond && kill -TERM "$pid" && await not test -e "w/$token"
    gone=$?; sleep 0.5; kill -TERM "$pid"; stuck_ends 143 2000 &&
    [ "$gone" = 0 ]'
check 'a step that is stuck in a message of -v ends at its time limit' '
    clogged 2 timeout -s KILL 20 "$acme" order -v -T 2 -C root.pem \
	-k account.key <record; got=$?
    echo "$got"; [ "$got" = 69 ]'
check 'and the step ends without a second signal, also after a warning' '
    stuck_respond && rm "w/$token" && mkdir "w/$token" &&
    kill -TERM "$pid"; stuck_ends 143 15000'

# A CA chooses the token, and so the name.
sed "s/$token/maintenance/g" http.rec >flag.rec
check 'an empty file of another program is left alone' '
    rm -rf w; mkdir w; : >w/maintenance
    step respond -w w <flag.rec 2>err; got=$?
    cat err; [ $got = 73 ] && [ -e w/maintenance ]'
[ "$(id -u)" != 0 ] ||
check 'and so is one of another user' '
    rm -rf w; mkdir w; : >"w/$token"; chown 65534 "w/$token"
    step respond -w w <http.rec 2>err; got=$?
    cat err; [ $got = 73 ] && [ -e "w/$token" ]'

group 'responders: HTTP'

http=$(free_port)
{ cat http.rec; echo "challenge http-01 dns b.example $ca/chall2 -b-token \
content of b"; } >two.rec
answering http "$http" two.rec
well=.well-known/acme-challenge
url=http://127.0.0.1:$http/$well
later slow './peer wait $http 1 ""'
later slower './peer wait $http 1 "GET /$well/$token HT"'
fetch() { curl -sS -g -i --path-as-is -m 8 "$@" | tr -d '\r' >reply; }
check 'what is published' '
    fetch "$url/$token" && cat reply &&
    grep -x "HTTP/1.1 200 OK" reply &&
    grep -xi "content-type: application/octet-stream" reply &&
    curl -sS "$url/$token" >got && printf %s "$token.$print" | cmp - got &&
    is "content of b" "curl -sS $url/-b-token"'
! has_v6 ||
check 'by IPv6 as well' '
    is "$token.$print" "curl -sSg http://[::1]:$http/$well/$token"'
check 'HEAD' '
    fetch "$url/$token" && sed "/^\$/q" reply >want &&
    fetch -I "$url/$token" && cat reply && diff want reply'
for path in / "/$well" "/$well/" "/$well/x" "/$well/$token/" \
    "/$well/${token}x" \
    "/$well/$token?x" "/$well/./$token" "/$well/%2e/$token" "//$well/$token" \
    "/$well/../../account.key" "/$well/${token%?}" "/$well/*" "$well/$token" \
    "/$well/$token.$print" "/$well/%4coqX"; do
	check "404: $path" '
	    printf "GET %s HTTP/1.1\r\nHost: x\r\n\r\n" "$path" |
	    timeout 8 socat -t 8 - TCP:127.0.0.1:$http >reply; cat reply
	    head -n 1 reply | grep "HTTP/1.1 404 Not Found" &&
	    not grep "$print" reply'
done
for method in POST PUT OPTIONS get G GETT '' DELETE; do
	check "404: ${method:-no method}" '
	    printf "%s /$well/$token HTTP/1.1\r\n\r\n" "$method" |
	    timeout 8 socat -t 8 - TCP:127.0.0.1:$http >reply; cat reply
	    head -n 1 reply | grep "HTTP/1.1 404 Not Found" &&
	    not grep "$print" reply'
done
check 'a byte at a time, with line feeds alone' '
    printf "GET /$well/$token HTTP/1.0\nHost: x\n\n" |
    timeout 8 socat -b 1 -t 8 - TCP:127.0.0.1:$http | grep -F "$token.$print"'
check 'half a request and the end' '
    printf "GET /$well/$token" |
    timeout 8 socat -t 8 - TCP:127.0.0.1:$http >reply; cat reply
    not grep "$print" reply'
check 'two hundred at once, all of whom take their time' '
    ./peer burst $http 200 "GET /$well/$token HTTP/1.1

"'
check 'garbage, megabytes and a header without end' '
    head -c 3000000 /dev/urandom >random
    for _ in 1 2 3; do
	timeout 8 socat -u random TCP:127.0.0.1:$http
	head -c 20000 /dev/urandom | timeout 8 socat -u - TCP:127.0.0.1:$http
	(printf "GET /$well/$token HTTP/1.1\r\nX: "; cat random) |
	    timeout 8 socat - TCP:127.0.0.1:$http
	(printf "POST / HTTP/1.1\r\nContent-Length: 3000000\r\n\r\n"
	    cat random) | timeout 8 socat - TCP:127.0.0.1:$http
    done >got 2>&1
    is "$token.$print" "curl -sS -m 8 $url/$token"'
check 'ten thousand connections' './peer flood $http 10000 "GET / HTTP"'
check 'then it still answers, in the memory that it had' '
    is "$token.$print" "curl -sS -m 8 $url/$token" && frugal http'
settle
within slow 8 13
within slower 8 13
check 'and without an end no request is answered' \
    'replay slow && replay slower && ! [ -s slower.out ]'
# Behind a balancer: curl sends version 1 of the PROXY protocol, haproxy both.
front=$(free_port)
answering behind "proxy:$front" two.rec
check 'version 1 of the PROXY protocol' '
    is "content of b" "curl -sS --haproxy-protocol \
	http://127.0.0.1:$front/$well/-b-token"'
for version in '' -v2; do
	balancer=$(free_port)
	cat >"haproxy$version.conf" <<-END
	defaults
		mode tcp
		timeout connect 5s
		timeout client 9s
		timeout server 9s
	listen front
		bind 127.0.0.1:$balancer
		server responder 127.0.0.1:$front send-proxy$version
	END
	be_server haproxy -db -f "haproxy$version.conf" >>servers.log 2>&1 &
	pids="$pids $!"
	check "haproxy with send-proxy$version" '
	    await listening $balancer &&
	    is "content of b" \
		"curl -sS http://127.0.0.1:$balancer/$well/-b-token"'
done
# knock BYTES: what comes back for these, in the form of printf.
knock() {
	printf "$1" | timeout 8 socat -t 8 - TCP:127.0.0.1:$front
}
ask="GET /$well/-b-token HTTP/1.0\r\n\r\n"
v2='\r\n\r\n\0\r\nQUIT\n'
check 'all forms of the header' '
    for header in "PROXY UNKNOWN\r\n" \
	"PROXY TCP6 ::1 ::1 1 2\r\n" "$v2\041\021\0\014123456789012" \
	"$v2\040\0\0\0" "$v2\041\0\0\003abc"; do
	knock "$header$ask" >got; cat got; grep "content of b" got || exit
    done'
check 'the header in pieces, and the request after it' '
    { printf "PRO"; sleep 0.3; printf "XY UNKNOWN\r"; sleep 0.3; printf "\n"
    sleep 0.3; printf "$ask"; } | timeout 8 socat -t 8 - TCP:127.0.0.1:$front |
    grep "content of b"'
long=$(head -c 120 /dev/zero | tr '\0' x)
for header in '' 'PROXX UNKNOWN\r\n' "PROXY $long\r\n" '\r\n\r\n\0\r\nQUIT ' \
    "$v2"'\041\021\377\377'; do
	check "nothing for what begins with: $header" '
	    knock "$header$ask" >got; cat got; ! [ -s got ]'
done
check 'peers that send no header, or half of one, are not in the way' '
    ./peer flood $front 300 "PROXY TCP4 1" &&
    is "content of b" "curl -sS --haproxy-protocol -m 8 \
	http://127.0.0.1:$front/$well/-b-token" && frugal behind'
ended behind TERM 143
dies 64 '-l proxy: is for http-01 and tls-alpn-01' \
    'step respond -t dns-01 -l proxy:5353 <http.rec'
# Fewer files than peers.
few=$(free_port)
answering few "127.0.0.1:$few" two.rec sh -c 'ulimit -n 24; exec "$@"' sh
check 'more peers than the system gives it files' '
    ./peer flood $few 100 "GET / HT" & sleep 1
    is "$token.$print" "curl -sS -m 3 http://127.0.0.1:$few/$well/$token"'
ended few KILL 137
ended http TERM 143

group 'responders: TLS-ALPN'
cat >tls.rec <<END
$(cat pending)
challenge tls-alpn-01 dns a.example $ca/chall a.example $hash
challenge tls-alpn-01 ip 127.0.0.1 $ca/chall2 1.0.0.127.in-addr.arpa \
$(echo 1 | openssl dgst -sha256 | sed 's/.* //')
challenge tls-alpn-01 ip 2001:db8::1 $ca/chall3 \
1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa \
$(echo 2 | openssl dgst -sha256 | sed 's/.* //')
END
alpn=$(free_port)
answering alpn "$alpn" tls.rec
# greet [OPTION...]: what s_client says; the certificate in alpn.pem.
greet() {
	timeout 8 openssl s_client -connect "127.0.0.1:$alpn" "$@" \
	    </dev/null >greeting 2>&1
	sed -n '/BEGIN CERT/,/END CERT/p' greeting >alpn.pem
	cat greeting
	[ -s alpn.pem ]
}
while read -r _ _ kind id _ sni sum; do
	check "the certificate for $id" '
	    greet -servername "$sni" -alpn acme-tls/1 &&
	    grep "ALPN protocol: acme-tls/1" greeting &&
	    openssl x509 -in alpn.pem -noout -ext subjectAltName |
	    sed 1d | tr A-Z a-z | tr -d " " >got && cat got &&
	    case $kind in
	    dns) echo "dns:$id" ;;
	    ip)	echo "ipaddress:$id" | sed "s/::/:0:0:0:0:0:/" ;;
	    esac | diff - got && openssl x509 -in alpn.pem -outform DER |
	    openssl asn1parse -inform DER | grep -A 2 1.3.6.1.5.5.7.1.31 >got &&
	    cat got && grep "BOOLEAN.*:255" got &&
	    grep -i ":0420$sum\$" got &&
	    openssl verify -ignore_critical -CAfile alpn.pem alpn.pem'
done <<END
$(grep '^challenge' tls.rec)
END
check 'in any case, among other protocols, with TLS 1.2' '
    greet -tls1_2 -servername A.Example -alpn h2,acme-tls/1,http/1.1 &&
    grep "ALPN protocol: acme-tls/1" greeting'
# OpenSSL wants the certificate's curve, P-256, among the groups.
for option in '-groups X25519:P-256' '-cipher ECDHE-ECDSA-AES256-GCM-SHA384' \
    '-cipher ECDHE-ECDSA-CHACHA20-POLY1305' \
    '-cipher ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-AES128-GCM-SHA256'
do
	chosen=${option##*[ :]}
	[ "${option#-c}" != "$option" ] || chosen=X25519
	check "a client with $option" '
	    greet -tls1_2 -servername a.example -alpn acme-tls/1 $option &&
	    grep -e "Server Temp Key: $chosen" -e "Cipher is $chosen" \
		greeting'
done
! has_v6 ||
check 'by IPv6 as well' '
    greet -servername a.example -alpn acme-tls/1 -connect "[::1]:$alpn"'
for option in '-noservername -alpn acme-tls/1' \
    '-servername b.example -alpn acme-tls/1' \
    '-servername xa.example -alpn acme-tls/1' \
    '-servername 127.0.0.1 -alpn acme-tls/1' '-servername a.example' \
    '-servername a.example -alpn h2' '-servername a.example -alpn acme-tls/' \
    '-tls1_1 -cipher ALL:@SECLEVEL=0 -servername a.example -alpn acme-tls/1' \
    '-tls1_2 -cipher ECDHE-RSA-AES128-SHA -servername a.example \
-alpn acme-tls/1'
do
	check "no handshake: $option" '
	    not greet $option'
done
check 'nothing is said to who is there' '
    (sleep 1; echo "GET / HTTP/1.0"; echo) | timeout 8 openssl s_client \
	-connect "127.0.0.1:$alpn" -servername a.example -alpn acme-tls/1 \
	-quiet 2>/dev/null >got; ! [ -s got ]'
later silent './peer wait $alpn 1 ""'
check 'garbage, and hellos that were spoiled' '
    timeout 8 socat -u random TCP:127.0.0.1:$alpn 2>err
    timeout 8 openssl s_client -connect 127.0.0.1:$alpn -alpn acme-tls/1 \
	-servername a.example -msg </dev/null |
    awk "/^>>>/ { n++ } /^<<</ { n = 9 } /^    / && n == 2" | tr -d " \n" \
	>hello
    [ -s hello ] && size=$(($(wc -c <hello) / 2)) && echo $size &&
    for i in $(seq 1 9 $size); do
	{ printf "160301%04x" $size; head -c $((i * 2)) hello; printf %02x $i
	  tail -c +$((i * 2 + 3)) hello; } | busybox xxd -r -p |
	timeout 8 socat -t 0.1 - TCP:127.0.0.1:$alpn
    done >got 2>&1
    greet -servername a.example -alpn acme-tls/1'
check 'ten thousand connections' './peer flood $alpn 10000 "$(
    printf "\026\003\001\002\001\001........................")"'
check 'then it still answers, in the memory that it had' '
    greet -servername a.example -alpn acme-tls/1 &&
    frugal alpn'
settle
within silent 8 13
ended alpn HUP 129
# Behind a balancer.
front=$(free_port)
answering behind "proxy:127.0.0.1:$front" tls.rec
for version in '' -v2; do
	alpn=$(free_port)
	sed -e "s/bind .*/bind 127.0.0.1:$alpn/" \
	    -e "s/1:[0-9]* send/1:$front send/" "haproxy$version.conf" \
	    >"haproxy-tls$version.conf"
	be_server haproxy -db -f "haproxy-tls$version.conf" \
	    >>servers.log 2>&1 &
	pids="$pids $!"
	check "haproxy with send-proxy$version, before TLS" '
	    await listening $alpn && greet -servername a.example \
		-alpn acme-tls/1 && grep "ALPN protocol: acme-tls/1" greeting'
done
ended behind TERM 143

group 'responders: DNS'
long=$(seq -s ' ' 200 400 | head -c 600)
cat >dns.rec <<END
$(cat pending)
challenge dns-01 dns *.a.example $ca/chall _acme-challenge.a.example $digest
challenge dns-01 dns a.example $ca/chall2 _acme-challenge.a.example other
challenge dns-01 dns b.example $ca/chall3 _acme-challenge.b.example of-b
END
cat >persist.rec <<END
$(cat pending)
challenge dns-persist-01 dns c.example $ca/chall \
_validation-persist.c.example ca.example; accounturi=$long
END
zone=$(free_port)
persist=$(free_port)
answering zone "$zone" dns.rec
answering persist "127.0.0.1:$persist" persist.rec
ask() { dig @127.0.0.1 -p "$zone" +tries=1 +time=4 "$@" >answer; cat answer; }
mine=_acme-challenge.a.example
both=$(printf '"%s"\n' "$digest" other | sort)
for option in '' +tcp +noedns '+noedns +ignore +notcp' +bufsize=512 \
    '+bufsize=1 +ignore' +bufsize=65535 +dnssec +nocookie +nsid +norecurse \
    +subnet=192.0.2.0/24 +padding=400 '+ednsopt=65001:00ff' +adflag +cdflag \
    +zflag '+ednsflags=0x7fff'; do
	check "the two values, dig $option" '
	    ask +short $option TXT $mine && sort answer >got &&
	    echo "$both" | diff - got'
done
! has_v6 ||
check 'by IPv6 as well' '
    ask +short @::1 TXT _acme-challenge.b.example &&
    [ "$(cat answer)" = "\"of-b\"" ]'
check 'the address that was asked answers' '
    ask +short @127.0.0.2 TXT _acme-challenge.b.example &&
    [ "$(cat answer)" = "\"of-b\"" ]'
check 'the answer is authoritative, and not to be kept' '
    ask TXT $mine && grep "flags: qr aa rd; QUERY: 1, ANSWER: 2" answer &&
    grep "status: NOERROR" answer &&
    grep "^$mine\..[^0-9]*0.IN.TXT" answer'
check 'the question comes back as it was written' '
    ask TXT _aCMe-ChaLLeNge.A.eXampLE && grep "ANSWER: 2" answer &&
    [ "$(grep -c "^;*_aCMe-ChaLLeNge.A.eXampLE\." answer)" = 3 ]'
for question in "A $mine" "AAAA $mine" "CAA $mine" "NS $mine" "ANY $mine" \
    "TXT x.$mine" "A x.y.$mine" "DNSKEY $mine" "TYPE65535 $mine"; do
	check "nothing, and says so: $question" '
	    ask +notcp $question && grep "status: NOERROR" answer &&
	    grep "flags: qr aa rd; QUERY: 1, ANSWER: 0, AUTHORITY: 1" answer &&
	    grep "^$mine\..[^0-9]*0.IN.SOA" answer'
done
check 'SOA' '
    ask SOA $mine && grep "ANSWER: 1, AUTHORITY: 0" answer &&
    grep "^$mine\..[^0-9]*0.IN.SOA" answer'
for question in 'TXT a.example' 'TXT example' 'NS .' 'A xa.example' \
    "TXT x$mine" 'TXT _acme-challenge.example' 'CH TXT version.bind' \
    "CH TXT $mine" 'TXT _acme-challenge.c.example' \
    'TXT a_acme-challenge.a.example'; do
	check "refused: $question" '
	    ask $question; grep "status: REFUSED" answer &&
	    grep "flags: qr rd; QUERY: 1, ANSWER: 0, AUTHORITY: 0" answer'
done
check 'other operations' '
    ask +opcode=notify TXT $mine; grep "status: NOTIMP" answer &&
    ask +opcode=update TXT $mine; grep "status: NOTIMP" answer'
check 'a long value: in pieces, and over TCP' '
    for option in +tcp "" +noedns; do
	ask -p "$persist" +short $option TXT _validation-persist.c.example
	tr -d "\\\\" <answer | sed "s/\" \"//g; s/\"//g" >got
	echo "ca.example; accounturi=$long" | diff - got || exit
    done'
check 'over UDP it is no amplifier' '
    ask -p "$persist" +ignore +bufsize=4096 TXT _validation-persist.c.example &&
    grep "flags: qr aa tc rd; QUERY: 1, ANSWER: 0" answer'
cat >dns.c <<'END'
#define main acme_main
#include "acme.c"
#undef main
/* Questions, most of them spoiled; an answer is never much longer. */
int
main(void)
{
	static const char *const names[] = { "\17_acme-challenge\1a\1b",
	    "\17_ACME-challenge\1a\1b", "\1x\17_acme-challenge\1a\1b",
	    "\1a\1b", "\300\14", "\77", "" };
	static const char opt[] = "\0\0\51\20\0\0\0\0\0\0\0";
	size_t most = 0, count[16] = { 0 };
	unsigned char *copy;
	Str s;

	for (int i = 0; i < 9; i++)
		set_value(keyword(S("challenge")), S("dns-01 dns a.b "
		    "https://x/ _acme-challenge.a.b "
		    "0123456789012345678901234567890123"));
	for (long i = 0; i < 400000; i++) {
		unsigned char b[600] = "id\1\0\0\1\0\0\0\0\0\0";
		const char *name = names[i % 7];
		size_t n = 12, mark = used, limit = i % 5 ? 512 : 65535;

		for (int k = i % 3 == 0 ? rand() % 200 : 0; k > 0; k--)
			b[n++] = 1, b[n++] = 'y';
		memcpy(b + n, name, strlen(name) + 1);
		n += strlen(name) + 1;
		memcpy(b + n, "\0\20\0\1", 4);
		n += 4;
		if (i % 2)
			b[11] = 1, memcpy(b + n, opt, 11), n += 11;
		for (int k = rand() % 6; k > 1; k--)
			b[rand() % n] = rand() >> 8;
		if (rand() % 4 == 0)
			n = rand() % (n + 1);
		copy = memcpy(malloc(n + !n), b, n);
		s = dns_answer((Str){ copy, n }, limit);
		if (s.n && (s.n < 12 || memcmp(s.p, b, 2) || !(s.p[2] & 128)))
			return 1;
		if (limit == 512 && (s.n > 4 * n || s.n > 1232))
			return printf("%d to %d\n", (int)n, (int)s.n), 1;
		if (limit == 512 && s.n * 100 / (n + !n) > most)
			most = s.n * 100 / n;
		if (s.n)
			count[s.p[3] & 15]++;
		free(copy);
		used = mark;
	}
	printf("at most %d %%\n", (int)most);
	return !count[0] || !count[1] || !count[4] || !count[5];
}
END
case $acme in
*-san|*-cov)	san='-fsanitize=address,undefined -fno-sanitize-recover=all' ;;
*)	san= ;;
esac
check 'hundreds of thousands of spoiled questions' '
    ${CC:-cc} -w -O1 $san -I"$src" dns.c -o dns -lbearssl &&
    ASAN_OPTIONS=detect_leaks=0 ./dns'
check 'several questions on one connection' '
    ask +short +tcp +keepopen TXT _acme-challenge.b.example \
	TXT _acme-challenge.b.example TXT _acme-challenge.b.example &&
    [ "$(grep -cx "\"of-b\"" answer)" = 3 ]'
later mute './peer wait $zone 1 "$(printf "\001\001")"'
check 'garbage, over UDP and TCP' '
    for i in $(seq 2 4 60); do
	openssl rand $((i * i)) | socat -u - UDP:127.0.0.1:$zone
	(printf "\377\377"; openssl rand $((i * 1200))) |
	    timeout 8 socat -u - TCP:127.0.0.1:$zone
	openssl rand $((i * 9)) | timeout 8 socat -u - TCP:127.0.0.1:$zone
    done >got 2>&1
    ask +short TXT $mine && [ "$(grep -c . answer)" = 2 ]'
check 'ten thousand connections' \
    './peer flood $zone 10000 "$(printf "\001\001................")"'
check 'then it still answers, in the memory that it had' '
    for option in +tcp +notcp; do
	ask +short $option TXT $mine && [ "$(grep -c . answer)" = 2 ] || exit
    done && frugal zone'
settle
within mute 8 13
ended zone TERM 143
ended persist KILL 137

group 'responders: nothing to lose'

# is_of PID FIELD: a field of a process's status, with single spaces.
is_of() { sed -n "s/^$2:[ 	]*//p" "/proc/$1/status" | tr -s ' \t' ' '; }
# bounds PID NAME: the soft and the hard limit.
bounds() {
	sed -n "s/^$2  *\([^ ]*\)  *\([^ ]*\) .*/\1 \2/p" "/proc/$1/limits"
}
nobody=65534
[ "$(id -u)" = 0 ] || nobody=$(id -u)
# A port that root alone may have, where the tests are root.
low=$(free_port)
[ "$(id -u)" != 0 ] || while
	low=$(shuf -i 600-1023 -n 1)
	grep -qi "$(printf ':%04X ' "$low")" /proc/net/tcp /proc/net/tcp6
do :; done
answering low "127.0.0.1:$low" two.rec bash -c \
    'ulimit -c unlimited; exec 7<account.key 300<account.key; exec "$@"' sh
child=$(cat low.child)
check 'it is nobody, in no group, at a port that was root'\''s' '
    grep "^[UG]" "/proc/$child/status"
    is "$nobody $nobody $nobody $nobody" "is_of $child Uid" &&
    { [ "$(id -u)" != 0 ] || {
	is "$nobody $nobody $nobody $nobody" "is_of $child Gid" &&
	is "" "is_of $child Groups | tr -d \" \""; }; } &&
    is "$token.$print" "curl -sS http://127.0.0.1:$low/$well/$token"'
check 'it has the pipe to its step and its listener, and no other file' '
    ls -l "/proc/$child/fd"
    is "0 1 2" "find /proc/$child/fd -lname \"pipe:*\" |
	sed \"s/.*\///\" | sort | xargs" &&
    is 1 "find /proc/$child/fd -lname \"socket:*\" | grep -c ." &&
    is 4 "find /proc/$child/fd -type l | grep -c ."'
check 'it may make no file, process or core, and has no terminal' '
    cat "/proc/$child/limits"
    for name in "Max file size" "Max processes" "Max core file size"; do
	is "0 0" "bounds $child \"$name\"" || exit
    done
    is / "readlink /proc/$child/cwd" &&
    is "$child" "cut -d \" \" -f 6 /proc/$child/stat"'
check 'its step leaves no core file either' '
    is "0 unlimited" "bounds $(cat low.pid) \"Max core file size\""'
check 'it has forgotten the environment' '
    tr "\0" "\n" <"/proc/$child/environ" >got; cat got
    not grep = got'
ended low TERM 143
cat >confined.c <<'END'
#define main acme_main
#include "acme.c"
#undef main
int
main(int argc, char **argv)
{
	bool root = geteuid() == 0;
	int fds[2], fd;

	for (int i = 0; i < LISTENERS; i++)
		listeners[i].fd = -1;
	pipe(fds);
	confine(fds[0]);
	if (write(1, "x", 1) >= 0 || write(fds[1], "x", 1) >= 0)
		return 1;
	if (fork() >= 0)
		return 2;
	fd = open(argv[1], O_WRONLY | O_CREAT, 0666);
	if (fd >= 0 && (root || write(fd, "x", 1) >= 0))
		return 3;
	if (open("/etc/shadow", O_RDONLY) >= 0)
		return 4;
	if (root && (setuid(0) == 0 || execv("/bin/true", argv) == 0))
		return 5;
	return 0;
}
END
check 'it can write, start, read and run nothing' '
    ${CC:-cc} -w -I"$src" confined.c -o confined -lbearssl &&
    ./confined "$PWD/made" && ! [ -s made ]'
check 'root of a user namespace that has no nobody serves all the same' '
    port=$(free_port)
    unshare -r "$acme" respond -v -C root.pem -k account.key -T 60 -s 50 \
	-l "127.0.0.1:$port" <two.rec 2>err & pid=$!
    await listening "$port"
    curl -sS -m 8 "http://127.0.0.1:$port/$well/$token" >got
    kill $pid; wait $pid; cat got err
    is "$token.$print" "cat got" && grep "cannot give up root" err'

group 'responders: what would end or stop them'

cp pending many.rec
for i in $(seq 130); do
	echo "challenge dns-01 dns n$i.example $ca/chall \
_acme-challenge.a.example $(printf '%0250d' "$i")"
done >>many.rec
many=$(free_port)
answering many "127.0.0.1:$many" many.rec
# As many questions of 45 bytes as a peer can send at once.
for _ in $(seq 91); do
	printf '\0\053id\1\0\0\1\0\0\0\0\0\0'
	printf '\17_acme-challenge\1a\7example\0\0\20\0\1'
done >questions
check '91 questions for 130 values in one segment: the memory suffices' '
    is 4095 "wc -c <questions" && for _ in 1 2 3; do
	timeout 8 socat -b 4095 -t 2 - TCP:127.0.0.1:$many <questions | wc -c
    done && ask -p "$many" +short +tcp TXT $mine &&
    [ "$(grep -c . answer)" = 130 ] && frugal many'
ended many TERM 143

# widowed FILE [OPTION...]: respond -l, whose responder is killed when the
# file is there; the step must end soon, and say why.
widowed() {
	told=$1; shift
	port=$(free_port)
	rm -f www/requests told
	: >www/requests
	"$acme" respond -C root.pem -k account.key -T 25 \
	    -l "127.0.0.1:$port" "$@" <http.rec 2>err & pid=$!
	await listening "$port"
	await [ -e "$told" ]
	await pgrep -P "$pid"
	kill -9 "$(pgrep -P "$pid")"
	start=$(date +%s)
	wait "$pid"
	got=$?
	echo "status $got"; cat err
	[ "$got" = 70 ] && [ $(($(date +%s) - start)) -lt 8 ] && grep "the \
responder was ended by signal 9" err
}
answer POST_chall '200 OK' '{"status":"processing"}'
answer POST_order '200 OK' "$(order pending)" 'Retry-After: 15'
check 'a responder that dies ends its step before anything is told' '
    widowed http.rec -s 20 && asked 0'
answer POST_told '200 OK' '{"status":"processing"}'
runs POST_chall 'touch ../told; cat POST_told'
check 'and while the CA validates' 'widowed told'
runs POST_chall 'touch ../told; sleep 15; cat POST_told'
check 'and while the CA is silent' 'widowed told'
answer POST_chall '200 OK' '{"status":"processing"}'
answer POST_order '200 OK' "$(order ready)"
check 'one that ends when all is done disturbs nobody' '
    port=$(free_port)
    step respond -l "127.0.0.1:$port" <http.rec >out &&
    grep -x "status ready" out'

# lacking ERRNO COMMAND...: accept() fails so for the command.
cat >lacking.c <<'END'
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifndef SYS_accept
#define SYS_accept SYS_accept4
#endif
int
main(int argc, char **argv)
{
	struct sock_filter f[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
		    offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_accept, 1, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_accept4, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | atoi(argv[1])),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
	};
	struct sock_fprog p = { sizeof f / sizeof f[0], f };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p) != 0)
		perror("seccomp"), exit(1);
	execvp(argv[2], argv + 2);
	return 127;
}
END
check 'a system that lacks something' '${CC:-cc} -w lacking.c -o lacking'
# ticks PID: hundredths of a second of the processor that it had.
ticks() { sed 's/.*) //' "/proc/$1/stat" | awk '{ print $12 + $13 }'; }
# idles NAME PORT: so it does, while a peer waits to be accepted.
idles() {
	timeout 3 ./peer wait "$2" 1 '' & waiting=$!
	sleep 0.5
	before=$(ticks "$(cat "$1.child")")
	sleep 1.5
	spent=$(($(ticks "$(cat "$1.child")") - before))
	wait "$waiting"
	echo "$spent ticks"
	[ "$spent" -lt 30 ]
}
for error in 12:ENOMEM 23:ENFILE 105:ENOBUFS; do
	lack=$(free_port)
	answering "${error#*:}" "127.0.0.1:$lack" two.rec \
	    ./lacking "${error%:*}"
	check "it pauses where accept() fails with ${error#*:}" \
	    "idles ${error#*:} $lack"
	ended "${error#*:}" TERM 143
done
lack=$(free_port)
# files NUMBER: as many may it have; who may say so is its own user.
files() {
	set -- prlimit --pid "$(cat lack.child)" --nofile="$1:"
	[ "$(id -u)" != 0 ] || set -- setpriv --reuid=65534 --regid=65534 \
	    --clear-groups "$@"
	"$@"
}
answering lack "127.0.0.1:$lack" two.rec
check 'and with EMFILE, where no peer can make room' '
    files 3 && idles lack "$lack"'
check 'it answers when there is room again' '
    files 64 &&
    is "$token.$print" "curl -sS -m 3 http://127.0.0.1:$lack/$well/$token"'
ended lack TERM 143

group 'keys in memory'

# What a step has left when it ends, and what its responder has, is looked
# through for keys.  The sanitizers keep copies that nobody can wipe.
cat >residue.c <<'END'
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
/*
 * residue SECRETS PID, or residue SECRETS MS COMMAND...: look through the
 * memory of a process, or of each process of a command when it ends; MS
 * milliseconds after its start, if not 0, the command gets SIGTERM.  The
 * shell's command SECRETS prints secrets, in hexadecimal digits, a line
 * each.  PIECE bytes of one count: as they are, backwards, in BearSSL's
 * words of 31 bits, or in base64.
 */
enum { PIECE = 12, MOST = 400000 };
static struct {
	unsigned char b[PIECE];
	const char *form;
	int next;
} piece[MOST];
static int npiece, first[1 << 16], found, looked;
static void
add(const unsigned char *p, size_t n, const char *form)
{
	for (size_t i = 0; i + PIECE <= n; i++) {
		int *at = &first[p[i] << 8 | p[i + 1]];

		if (++npiece == MOST)
			abort();
		memcpy(piece[npiece].b, p + i, PIECE);
		piece[npiece].form = form;
		piece[npiece].next = *at;
		*at = npiece;
	}
}
static void
add_base64(const unsigned char *p, size_t n)
{
	static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghij"
	    "klmnopqrstuvwxyz0123456789+/";
	unsigned char o[2048];

	for (size_t shift = 0; shift < 6; shift += 2) {
		size_t m = 0;

		for (size_t bit = shift; bit + 6 <= 8 * n; bit += 6)
			o[m++] = digit[(p[bit / 8] << 8 | (bit / 8 + 1 < n ?
			    p[bit / 8 + 1] : 0)) >> (10 - bit % 8) & 63];
		add(o, m, "base64");
	}
}
static void
add_words(const unsigned char *p, size_t n)
{
	uint32_t w[200] = { 0 };

	for (size_t bit = 0; bit < 8 * n; bit++)
		w[bit / 31] |= (uint32_t)(p[n - 1 - bit / 8] >> bit % 8 & 1)
		    << bit % 31;
	add((void *)w, 8 * n / 31 * 4, "words");
}
static void
read_secrets(const char *command)
{
	FILE *f = popen(command, "r");
	static char hex[4096];

	while (fgets(hex, sizeof hex, f)) {
		unsigned char b[1024], r[1024];
		size_t n = 0;

		for (unsigned v; sscanf(hex + 2 * n, "%2x", &v) == 1; n++)
			b[n] = v;
		for (size_t i = 0; i < n; i++)
			r[i] = b[n - 1 - i];
		add(b, n, "bytes");
		add(r, n, "backwards");
		add_base64(b, n);
		add_words(b, n);
	}
	pclose(f);
}
static void
look_at(pid_t pid)
{
	char name[64], line[512];
	FILE *maps, *mem;

	sprintf(name, "/proc/%d/maps", (int)pid);
	maps = fopen(name, "r");
	sprintf(name, "/proc/%d/mem", (int)pid);
	mem = fopen(name, "r");
	while (maps && mem && fgets(line, sizeof line, maps)) {
		unsigned long from, to;
		unsigned char *b;
		char mode[8];
		size_t n;

		sscanf(line, "%lx-%lx %7s", &from, &to, mode);
		if (mode[1] != 'w')
			continue;
		b = malloc(to - from);
		n = fseeko(mem, from, SEEK_SET) ? 0 :
		    fread(b, 1, to - from, mem);
		looked += n > 0;
		for (size_t i = 0; i + PIECE <= n; i++)
			for (int k = first[b[i] << 8 | b[i + 1]]; k;
			    k = piece[k].next)
				if (!memcmp(piece[k].b, b + i, PIECE) &&
				    found++ % 100 == 0)
					fprintf(stderr, "%s at %lx in %s",
					    piece[k].form, from + i, line);
		free(b);
	}
	if (maps)
		fclose(maps);
	if (mem)
		fclose(mem);
}
static int
follow(const char *secrets, pid_t command, int ms)
{
	struct timespec pause = { ms / 1000, ms % 1000 * 1000000 };
	int status, end = -1, sig;
	pid_t pid;

	waitpid(command, &status, 0);
	ptrace(PTRACE_SETOPTIONS, command, 0, PTRACE_O_TRACEEXIT |
	    PTRACE_O_TRACEFORK | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL);
	ptrace(PTRACE_CONT, command, 0, 0);
	if (ms && fork() == 0) {
		nanosleep(&pause, NULL);
		kill(command, SIGTERM);
		_exit(0);
	}
	while ((pid = waitpid(-1, &status, __WALL)) > 0) {
		if (pid == command && !WIFSTOPPED(status))
			end = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
		if (!WIFSTOPPED(status))
			continue;
		sig = status >> 16 || WSTOPSIG(status) == SIGSTOP ? 0 :
		    WSTOPSIG(status);
		if (status >> 16 == PTRACE_EVENT_EXIT) {
			if (!npiece)
				read_secrets(secrets);
			look_at(pid);
		}
		ptrace(PTRACE_CONT, pid, 0, sig);
	}
	return end;
}
int
main(int argc, char **argv)
{
	int end = 0;
	pid_t pid;

	if (argc == 3) {
		read_secrets(argv[1]);
		look_at(atoi(argv[2]));
	} else if ((pid = fork()) == 0) {
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		raise(SIGSTOP);
		execvp(argv[3], argv + 3);
		_exit(127);
	} else
		end = follow(argv[1], pid, atoi(argv[2]));
	fprintf(stderr, "status %d, %d areas, %d of %d pieces found\n", end,
	    looked, found, npiece);
	return !npiece || !looked || found ? 1 : 0;
}
END

group 'keys in memory: the steps'

# private.sh KEY...: the private numbers of keys.
cat >private.sh <<'END'
for key; do
	openssl pkey -in "$key" -noout -text
done | awk '/^[^ ]/ { if (show) print ""
	    show = /^(priv:|privateE|prime|exponent|coefficient)/ }
	/^ / && show { gsub("[ :]", ""); printf "%s", $0 }'
echo
END
# clean_end KEYS STATUS COMMAND...: ends so, perhaps by SIGTERM $after ms
# after its start, and has no such keys in its memory then.
clean_end() {
	keys=$1 want=$2
	shift 2
	./residue "sh private.sh $keys" "${after:-0}" "$@" 2>residue.err
	got=$?
	cat residue.err >&2
	[ "$got" = 0 ] && grep -q "^status $want, " residue.err
}
a_step() { echo "$acme" "$1" -C root.pem -k "$2.pem" -T 20; }
case $acme in
*-san|*-cov)	;;
*)	check 'what looks for them' '${CC:-cc} -w -O1 residue.c -o residue'
	printf 'kid-1 %s\n' "$mac_key" >eab.file && chmod 600 eab.file
	cp www/POST_chall www/POST_chall2
	cp www/POST_chall www/POST_chall3
	for type in ec256 ec384 rsa2048; do
		for kind in http tls dns; do
			own_key=$type.pem
			at=$(free_port)
			answering "$kind" "127.0.0.1:$at" "$kind.rec"
			check "$type, $kind: the responder has no key" '
			    ./residue "sh private.sh $own_key" \
				"$(cat '$kind'.child)" 2>&1'
			check 'which its step has, so that one can be seen' '
			    not ./residue "sh private.sh $own_key" \
				"$(cat '$kind'.pid)" 2>&1'
			ended "$kind" HUP 129
			check "$type, $kind: nothing is left" '
			    clean_end $own_key 0 $(a_step respond $type) \
				-l "127.0.0.1:$at" <'$kind'.rec >out'
		done
		check "$type: -x, and a hook that is not there" '
		    clean_end $type.pem 0 $(a_step respond $type) -x true \
			<http.rec >out &&
		    clean_end $type.pem 73 $(a_step respond $type) -x ./none \
			<http.rec'
		check "$type: -c, and the processes that look" '
		    clean_end $type.pem 75 $(a_step respond $type) -x true \
			-c -s 1 -H a.example:80:127.0.0.1 <http.rec'
		check "$type: new keys, requests, thumbprints" '
		    clean_end new.$type 0 "$acme" key -t $type -o new.$type &&
		    clean_end $type.pem 0 "$acme" csr -K $type.pem a.example &&
		    clean_end $type.pem 0 "$acme" due -K $type.pem leaf.pem &&
		    clean_end $type.pem 0 "$acme" thumbprint -k $type.pem'
		check "$type: failures" '
		    clean_end $type.pem 74 sh -c "exec \"\$@\" >/dev/full" sh \
			"$acme" thumbprint -k $type.pem &&
		    clean_end "$type.pem leaf.key" 65 $(a_step key-change \
			$type) -a account -K $type.pem &&
		    clean_end $type.pem 77 $(a_step get $type) -a account \
			"$ca/none"'
	done
	unset own_key
	printf '%s\n' "printf $mac_key | xxd -p | tr -d '\n'; echo" \
	    "printf $mac_key | tr -- -_ +/ | openssl base64 -d -A |
	    xxd -p | tr -d '\n'" >private.eab
	check 'the secret of an external account binding' '
	    answer POST_newAccount "201 Created" "{}" "Location: $ca/a/1"
	    ./residue "sh private.eab" 0 $(a_step new-account ec256) \
		-d "$ca/dir" -e eab.file 2>residue.err; got=$?
	    cat residue.err; [ $got = 0 ] && grep "^status 0, " residue.err'
	check 'a process that looks a name up has no key, nor a variable' '
	    ACME_EAB_KID=k ACME_EAB_HMAC_KEY=$mac_key inside_net "$acme" \
		new-account -k ec256.pem -C root.pem -T 20 \
		-d https://silent-silent.names.test:8443/dir 2>/dev/null &
	    await looking_up 2 || exit
	    for child in $(pgrep -P "$looker"); do
		echo "sh private.sh ec256.pem; sh private.eab" >private.all
		./residue "sh private.all" "$child" || exit
	    done
	    not ./residue "sh private.all" "$looker" && kill "$looker"'
	for ms in 1 2 3 4 6 8; do
		check "a look-up, or before it: SIGTERM after $ms ms" '
		    own=-rn
		    [ "$(id -u)" != 0 ] || own=-n
		    after=$ms
		    clean_end ec256.pem ".*" unshare $own "$acme" new-account \
			-y -k ec256.pem -C root.pem -T 20 \
			-d https://a.invalid/dir'
	done
	for ms in 1 2 4 8 16 32; do
		check "rsa4096: SIGTERM after $ms ms" '
		    after=$ms
		    clean_end rsa4096.pem ".*" "$acme" thumbprint \
			-k rsa4096.pem; got=$?
		    grep "status 143" residue.err && echo yes >signalled
		    [ $got = 0 ]'
	done
	check 'which came in time at least once' 'grep yes signalled'
	;;
esac

group 'hooks'

# A hook that writes down how it is called; FAIL says what it does then.
cat >hook <<'END'
#!/bin/sh
{
	printf '%s' "${0##*/}"
	[ $# = 0 ] || printf ' [%s]' "$@"
	printf '\n'
	env | grep -e '^ACME_[TINC][YDAO]' -e ^CERTBOT | sort >&3
	find /proc/self/fd -lname 'socket:*' >&3
} >>calls 3>>found
echo 'this is said'
case $1 in deploy_*|begin|present|'') eval "$FAIL" ;; esac
case $1 in clean_*|done|failed|cleanup) eval "$HANG" ;; esac
END
chmod 755 hook
ln -s hook undo
# hooked STYLE RECORD [OPTION...]: the step, with fresh notes.
hooked() {
	style=$1 rec=$2; shift 2
	rm -f calls found
	step respond -x "$style" "$@" <"$rec"
}
answer POST_chall '200 OK' '{"status":"processing","token":"'$token'"}'
cp www/POST_chall www/POST_chall2
cp www/POST_chall www/POST_chall3
answer POST_order '200 OK' "$(order ready)"
# called LINE...: these were the calls.
called() { printf 'hook %s\n' "$@" | sed 's/ $//' | diff - calls; }
d=$token.$print
check 'dehydrated, http-01' '
    hooked ./hook http.rec >out && grep -x "status ready" out &&
    not grep "this is said" out && called \
	"[deploy_challenge] [a.example] [$token] [$d]" \
	"[clean_challenge] [a.example] [$token] [$d]"'
check 'what is in the environment, and that no socket is there' '
    cat found; printf "ACME_%s\n" "CONTENT=$d" "IDENTIFIER=a.example" \
	"NAME=$token" "TYPE=http-01" >want && cat want want | diff - found'
check 'dehydrated, dns-01: all published, then all taken down' '
    hooked dehydrated:./hook dns.rec >out && grep -x "status ready" out &&
    called "[deploy_challenge] [a.example] [$token] [$digest]" \
	"[deploy_challenge] [a.example] [$token] [other]" \
	"[deploy_challenge] [b.example] [$token] [of-b]" \
	"[clean_challenge] [b.example] [$token] [of-b]" \
	"[clean_challenge] [a.example] [$token] [other]" \
	"[clean_challenge] [a.example] [$token] [$digest]" &&
    grep -Fx "ACME_IDENTIFIER=*.a.example" found'
sed -n '1,/challenge/p' tls.rec >tls1.rec
check 'dehydrated, tls-alpn-01: a digest as openssl prints it' '
    hooked ./hook tls1.rec >out &&
    sum=$(printf %s "$d" | openssl dgst -sha256 -c | sed "s/.* //") &&
    called "[deploy_challenge] [a.example] [$token] [$sum]" \
	"[clean_challenge] [a.example] [$token] [$sum]"'
check 'uacme' '
    hooked uacme:./hook dns.rec >out && grep -x "status ready" out &&
    sed -n "3p;4p" calls >three && cat calls && printf "hook %s\n" \
	"[begin] [dns-01] [b.example] [$token] [of-b]" \
	"[done] [dns-01] [b.example] [$token] [of-b]" | diff - three &&
    hooked uacme:./hook http.rec >out &&
    called "[begin] [http-01] [a.example] [$token] [$d]" \
	"[done] [http-01] [a.example] [$token] [$d]" &&
    hooked uacme:./hook tls1.rec >out &&
    called "[begin] [tls-alpn-01] [a.example] [$token] [$digest]" \
	"[done] [tls-alpn-01] [a.example] [$token] [$digest]"'
check 'lego' '
    hooked lego:./hook dns.rec -t dns-01 >out && head -n 2 calls >two &&
    printf "hook [present] [_acme-challenge.a.example.] [%s]\n" "$digest" \
	other | diff - two &&
    tail -n 1 calls | grep -Fx "hook [cleanup] [_acme-challenge.a.example.] \
[$digest]"'
check 'certbot' '
    hooked certbot:./hook,./undo dns.rec >out && grep "status ready" out &&
    printf "%s\n" hook hook hook undo undo undo | diff - calls &&
    grep "^CERTBOT" found | head -n 5 >first && cat found &&
    printf "CERTBOT_%s\n" "ALL_DOMAINS=a.example,a.example,b.example" \
	"DOMAIN=a.example" "IDENTIFIER=a.example" "REMAINING_CHALLENGES=2" \
	"VALIDATION=$digest" | diff - first &&
    [ "$(grep -cx "CERTBOT_AUTH_OUTPUT=this is said" found)" = 3 ] &&
    not grep CERTBOT_TOKEN found &&
    hooked certbot:./hook,./undo http.rec >out &&
    grep -x "CERTBOT_TOKEN=$token" found &&
    [ "$(grep -cx "CERTBOT_VALIDATION=$d" found)" = 2 ]'

group 'hooks after a run that was killed'

# validated TYPE: the CA has, after the record was written.
validated() {
	rm -f www/requests
	answer POST_authz '200 OK' '{"status":"valid","identifier":{"type":
"dns","value":"a.example"},"challenges":[{"type":"'"$1"'","status":"valid",
"url":"'"$ca/chall"'","token":"'"$token"'"},{"type":"dns-02","status":"valid",
"url":"'"$ca/x"'"}]}'
}
validated dns-01
check 'after a kill the same command takes down, if the order is ready' '
    hooked ./hook pending -t dns-01 >out && grep -x "status ready" out &&
    not grep ^challenge out &&
    called "[clean_challenge] [a.example] [$token] [$digest]" && asked 0 &&
    hooked ./hook pending >out &&
    called "[clean_challenge] [a.example] [$token] [$digest]" &&
    hooked uacme:./hook pending >out &&
    called "[done] [dns-01] [a.example] [$token] [$digest]" &&
    hooked certbot:./hook,./undo pending -t dns-01 >out &&
    is undo "cat calls" && grep -x "CERTBOT_VALIDATION=$digest" found &&
    hooked lego:./hook pending -t dns-01 >out && called \
	"[cleanup] [_acme-challenge.a.example.] [$digest]"'
check 'but not what was never published' '
    hooked ./hook pending -t http-01 >out && grep -x "status ready" out &&
    [ ! -e calls ] && validated http-01 &&
    hooked lego:./hook pending >out && [ ! -e calls ] &&
    hooked ./hook record -t http-01 | diff record - && [ ! -e calls ]'
check 'hooks have no secret of ours, and their own limit of core files' '
    export FAIL="env >env.seen; ulimit -c >core.seen"
    export ACME_EAB_KID=k ACME_EAB_HMAC_KEY=s ACME_EABX=x
    export ASAN_OPTIONS=disable_coredump=0
    ulimit -S -c 77 && hooked ./hook http.rec >out && grep "status ready" out &&
    is 77 "cat core.seen" && not grep ACME_EAB_ env.seen &&
    grep -x ACME_EABX=x env.seen'
cat >through.sh <<'END'
env >env.seen
ulimit -c >core.seen
exec socat - "TCP:$1:$2"
END
check 'nor has the command of -P' '
    export ACME_EAB_KID=k ACME_EAB_HMAC_KEY=s
    export ASAN_OPTIONS=disable_coredump=0
    ulimit -S -c 77 &&
    step directory -d "$ca/dir" -P "sh through.sh %h %p" &&
    is 77 "cat core.seen" && not grep ACME_EAB_ env.seen'
answer POST_chall.9 '403 Forbidden' "$(problem unauthorized)"
check 'uacme is told when it failed' '
    rm -f www/POST_chall; answer POST_chall "403 Forbidden" "{}"
    hooked uacme:./hook http.rec >out 2>err; [ $? != 0 ] &&
    called "[begin] [http-01] [a.example] [$token] [$d]" \
	"[failed] [http-01] [a.example] [$token] [$d]"'
cp www/POST_chall2 www/POST_chall
rm -f www/POST_chall.9
export FAIL
both='[deploy_challenge] [a.example] [TOKEN] [a]
[deploy_challenge] [b.example] [TOKEN] [b]'
{ cat pending; for i in a b; do
	echo "challenge http-01 dns $i.example $ca/chall $i 'c $i'"
done; } >ab.rec

group 'hooks that fail'

# Each call for a, and what takes it down.
a="[deploy_challenge] [a.example] [a] ['c a']"
b="[deploy_challenge] [b.example] [b] ['c b']"
undo_a="[clean_challenge] [a.example] [a] ['c a']"
undo_b="[clean_challenge] [b.example] [b] ['c b']"
FAIL='[ $2 = a.example ] || exit 3'
dies 73 'the hook ./hook failed with status 3 for b.example' \
    'hooked ./hook ab.rec 2>all; got=$?; grep respond all >&2; exit $got'
check 'what was published is taken down' 'called "$a" "$b" "$undo_a"'
FAIL='[ $2 = a.example ] || kill -9 $$'
dies 73 'the hook ./hook was ended by signal 9 for b.example' \
    'hooked ./hook ab.rec 2>all; got=$?; grep respond all >&2; exit $got'
check 'what may have been published, too' \
    'called "$a" "$b" "$undo_b" "$undo_a"'
for hook in ./nowhere ./ab.rec . './hook;true' './hook x' '$(./hook)'; do
	dies 73 'cannot run the hook' "hooked '$hook' http.rec 2>all; got=\$?
	    tail -n 1 all >&2; exit \$got"
done
echo 'echo it ran >ran' >shell.less && chmod 755 shell.less
case $acme in
*-san|*-cov)	# glibc's execvp() has a shell for such a file
	;;
*)	dies 73 'status 127' 'hooked ./shell.less http.rec 2>all; got=$?
	    tail -n 1 all >&2; exit $got'
	;;
esac
check 'no shell has run anything' '! [ -e ran ] && ! [ -e calls ]'
for option in '' uacme: dehydrated: lego:; do
	dies 64 'STYLE:' "hooked '$option' http.rec"
done
for option in certbot:./hook certbot: 'certbot:,' certbot:,x 'certbot:x,'; do
	dies 64 'certbot:AUTH,CLEANUP' "hooked '$option' http.rec"
done
dies 64 'lego.*DNS' 'hooked lego:./hook http.rec'
check 'a hook of uacme'\''s declines one challenge, and takes another' '
    { cat http.rec; grep "a.example $ca/chall2" dns.rec; } >mixed.rec
    FAIL="[ \$2 != http-01 ] || exit 1" hooked uacme:./hook mixed.rec >out &&
    called "[begin] [http-01] [a.example] [$token] [$d]" \
	"[begin] [dns-01] [a.example] [$token] [other]" \
	"[done] [dns-01] [a.example] [$token] [other]"'
FAIL='exit 1'
dies 77 'the hook ./hook declined every challenge for a.example' \
    'hooked uacme:./hook http.rec 2>all; got=$?; tail -n 1 all >&2; exit $got'
FAIL='head -c 9000 /dev/zero | tr "\0" x; echo'
dies 70 'printed more than 4096 bytes' \
    'hooked certbot:./hook,./undo http.rec 2>all; got=$?
    grep respond all >&2; exit $got'
check 'and is taken down' 'printf "%s\n" hook undo | diff - calls'
FAIL=
check 'whoever has ignored the end of his children' '
    trap "" CHLD; FAIL="exit 3" hooked ./hook http.rec 2>err; got=$?
    cat err; [ $got = 73 ] && grep "failed with status 3" err'

group 'hooks that hang'

# What takes its time, at once.
for job in hang undo left; do
	mkdir "d.$job" && cp hook undo ab.rec http.rec root.pem account.key \
	    "d.$job"
done
later hang 'cd d.hang; FAIL="[ \$2 = a.example ] || sleep 77.$$" \
    hooked ./hook ab.rec -T 3'
later undo 'cd d.undo; HANG="sleep 78.$$" hooked ./hook ab.rec -T 4'
later left 'cd d.left; FAIL="sleep 20 & echo a server" \
    hooked certbot:./hook,./undo http.rec'
mkdir d.term && cp hook ab.rec root.pem account.key d.term && cd d.term &&
    FAIL="[ \$2 = a.example ] || sleep 79.$$" "$acme" respond -C root.pem \
	-k account.key -x ./hook <ab.rec >../term.out 2>../term.err &
term=$!
await grep -q b.example d.term/calls
kill -TERM $term
wait $term
got=$?
check 'SIGTERM while a hook runs' '
    echo "$got"; cat term.err; [ "$got" = 143 ] && ! [ -s term.out ] &&
    cp d.term/calls . && called "$a" "$b" "$undo_b" "$undo_a"'
settle
check 'a hook that hangs' '
    replay hang; [ $? = 75 ] && cd d.hang &&
    grep "time limit of 3 s reached while running the hook ./hook" \
	../hang.err && called "$a" "$b" "$undo_b" "$undo_a"'
within hang 3 8
check 'hooks that hang while they take down' '
    replay undo; [ $? = 75 ] && cat d.undo/calls &&
    [ "$(grep -c "failed to clean up" undo.err)" = 2 ]'
within undo 3 20
check 'a hook that leaves something running, which has our pipe' '
    replay left && grep "status ready" left.out && grep "AUTH_OUTPUT=this is \
said" d.left/found'
within left 0 8
check 'nothing of the others still runs' '
    cat /proc/[0-9]*/cmdline 2>/dev/null | tr "\0" " " |
    not grep -o "sleep 7[789][.]$$"'
unset FAIL

group 'ACME: certificates'

openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 \
    -out another.key
for name in leaf deep-leaf misnamed widened; do
	cp leaf.key $name.key
done
issue leaf root subjectAltName=DNS:a.example
issue deep-leaf middle subjectAltName=DNS:a.example
issue misnamed root subjectAltName=DNS:b.example
issue widened root subjectAltName=DNS:a.example,DNS:b.example
issue another root subjectAltName=DNS:a.example
issue elsewhere stranger subjectAltName=DNS:x
cat deep-leaf.pem middle.pem >chain.pem
fresh
answer POST_order '200 OK' "$(order ready)"
answer POST_finalize '200 OK' \
    "$(order valid "\"certificate\":\"$ca/certificate\"")"
finalize() {
	rm -f www/requests
	step finalize -K leaf.key "$@" <record
}
# chain TEXT: what the CA sends.
chain() { answer POST_certificate '200 OK' "$1
" 'Content-Type: application/pem-certificate-chain'; }
chain "$(cat chain.pem)"
check 'a chain' 'finalize >out && diff out chain.pem'
check 'the request is for the key and the names of the record' '
	part www/body.POST_finalize.1 payload | from_base64url >payload
	part payload csr | from_base64url >csr &&
	openssl req -inform DER -in csr -noout -verify &&
	openssl req -inform DER -in csr -noout -text |
	    grep -x " *DNS:a.example" &&
	openssl req -inform DER -in csr -noout -pubkey >public &&
	openssl pkey -in leaf.key -pubout | diff - public'
check 'a chain into a file' '
	finalize -o file.pem >out && [ ! -s out ] && diff file.pem chain.pem'
check 'one certificate alone' '
	chain "$(cat leaf.pem)"; finalize >out && diff out leaf.pem'
check 'CR LF, text around, no final newline: printed strictly' '
	answer POST_certificate "200 OK" "$(
		printf "subject=x\r\n\r\n"
		sed "s/\$/\r/" deep-leaf.pem
		printf "\r\nissuer: y\r\n\r\n"
		sed "s/\$/\r/" middle.pem)"
	grep -c "$(printf "\r")" www/POST_certificate
	finalize >out && diff out chain.pem'
check 'a certificate that comes twice is printed once' '
	for doubles in "deep-leaf deep-leaf middle" "deep-leaf middle middle" \
	    "deep-leaf middle deep-leaf middle"; do
		chain "$(for name in $doubles; do cat $name.pem; done)"
		finalize >out && diff out chain.pem || exit
	done'
for kind in 'with a byte order mark' 'with white space'; do
	check "a chain $kind: printed strictly" '
		answer POST_certificate "200 OK" "$(odd "$kind" deep-leaf.pem
			odd "$kind" middle.pem)"
		finalize >out && diff out chain.pem'
	for form in PEM DER; do
		check "a request $kind, of $form" '
			"$acme" csr -K leaf.key a.example >odd.csr
			[ $form = PEM ] ||
			    openssl req -in odd.csr -outform DER -out odd.der
			[ $form = DER ] || odd "$kind" odd.csr >odd.der
			step finalize -r odd.der <record >out &&
			diff out chain.pem'
	done
	check "what -R and revoke-cert are about $kind" '
		answer POST_revoke "200 OK" ""; rm -f www/requests
		{ odd "$kind" deep-leaf.pem; cat middle.pem; } >odd.pem
		step revoke-cert -a account odd.pem &&
		part www/body.POST_revoke.1 payload | from_base64url >payload &&
		part payload certificate | from_base64url |
		openssl x509 -inform DER | diff - deep-leaf.pem'
done

# spoils WORDS TEXT: a chain that is refused, and the old file stays.
echo old >file.pem
spoils() {
	chain "$2"
	dies 76 "$1" ": '$(printf %s "$2" | head -c 40)'; finalize -o file.pem"
	check 'the old file stays' 'is old "cat file.pem" &&
	    ! ls -A | grep -e "[.]acme-step"'
}
spoils . ''
spoils . 'nonsense'
spoils . "$(cat leaf.pem leaf.key)"
spoils . "$(cat leaf.key leaf.pem)"
spoils . "$(cat leaf.pem public.pem)"
spoils . "$(cat chain.pem; openssl crl2pkcs7 -nocrl -certfile leaf.pem)"
spoils key "$(cat another.pem)"
spoils name "$(cat misnamed.pem)"
spoils name "$(cat widened.pem)"
spoils . "$(cat middle.pem deep-leaf.pem)"
spoils . "$(cat leaf.pem middle.pem)"
spoils . "$(cat deep-leaf.pem root.pem)"
spoils . "$(cat deep-leaf.pem elsewhere.pem)"
spoils . "$(head -n 4 leaf.pem)"
spoils . "$(head -c -9 leaf.pem)"
spoils . "$(head -c -9 chain.pem)"
spoils . "$(sed 's/END CERT/END X509 CERT/' chain.pem)"
spoils . "$(cat leaf.pem; head -n 4 middle.pem)"
spoils . "$(sed '2s/./*/' leaf.pem)"
spoils . "$(printf '%s\n' '-----BEGIN CERTIFICATE-----' \
    '-----END CERTIFICATE-----')"
spoils . "$(openssl x509 -in leaf.pem -outform DER | head -c 200 |
    openssl base64 | sed '1i -----BEGIN CERTIFICATE-----
$a -----END CERTIFICATE-----')"
spoils . "$(i=0; while [ $((i += 1)) -lt 40 ]; do cat middle.pem; done)"
chain "$(cat chain.pem)"
runs POST_certificate "printf '${ok}Content-Length: 2000\r\n\r\n'
    head -n 9 ../chain.pem; exit"
dies 69 . ': half a chain; finalize -T 4 -o file.pem'
check 'and the old file stays' 'is old "cat file.pem"'
for reply in "$(order valid)" "$(order invalid)" "$(order nonsense)" '{}' \
    "$(order valid '"certificate":"http://localhost/x"')"; do
	answer POST_finalize '200 OK' "$reply"
	answer POST_order.2 '200 OK' "$reply"
	case $reply in
	*invalid*) dies 77 . ": '$reply'; finalize -o file.pem" ;;
	*) dies 76 . ": '$reply'; finalize -T 2 -o file.pem" ;;
	esac
done
rm www/POST_order.2
check 'and the old file still stays' 'is old "cat file.pem"'
answer POST_finalize '200 OK' "$(order processing)"
answer POST_order '200 OK' "$(order processing)"
dies 75 . ': processing for ever; finalize -T 2'
answer POST_order '200 OK' "$(order processing)" 'Retry-After: 6666'
answer POST_finalize '200 OK' "$(order processing)" 'Retry-After: 6666'
dies 75 6666 finalize
answer POST_order '200 OK' \
    "$(order valid "\"certificate\":\"$ca/certificate\"")"
chain "$(cat chain.pem)"
check 'a valid order is not finalized again' '
	sed s/ready/valid/ record >valid
	rm -f www/requests
	step finalize -K leaf.key <valid >out && diff out chain.pem &&
	! grep finalize www/requests'
check 'certificate downloads it again' '
	step certificate <valid >out && diff out chain.pem'
dies 73 missing 'finalize -o missing/file.pem'
check 'and nothing was asked' '
	finalize -o missing/file.pem; [ ! -e www/requests ]'
dies 66 none.key 'step finalize -K none.key <record'
dies 64 . 'step finalize <record'

group 'ACME: the names of a certificate request'

# request NAME SUBJECT ALT-NAMES [OPTION]...: NAME.csr, by openssl.
request() {
	csr=$1 names=${3:+subjectAltName=$3} subject=$2; shift 3
	[ -e "$csr.key" ] || cp leaf.key "$csr.key"
	openssl req -new -key "$csr.key" -subj "$subject" \
	    ${names:+-addext "$names"} "$@" -out "$csr.csr" 2>>req.log
}
fresh
answer POST_newOrder '400 Bad Request' "$(problem malformed)"
# asks NAME IDENTIFIER...: new-order -r orders these, and no others.
asks() {
	csr=$1; shift
	check "the names of $csr.csr are ordered: $*" '
	    rm -f www/requests
	    step new-order -a account -r $csr.csr 2>err; [ $? = 77 ] &&
	    part www/body.POST_newOrder.1 payload | from_base64url >payload &&
	    "$acme" json identifiers payload | while read -r one; do
		echo "$one" | "$acme" json value; done | sort | tr "\n" " " >got
	    is "$want" "cat got"'
}
request names /CN=ignored 'DNS:B.example,DNS:*.a.example,IP:192.0.2.7'
want='*.a.example 192.0.2.7 b.example ' asks names
request common /CN=A.Example DNS:b.example
want='a.example b.example ' asks common
request both /CN=A.Example DNS:b.example,DNS:a.example
want='a.example b.example ' asks both
request alone /CN=a.example ''
want='a.example ' asks alone
request label /CN=localhost ''
want='localhost ' asks label
openssl req -in names.csr -outform DER -out der.csr
want='*.a.example 192.0.2.7 b.example ' asks der
request mail / 'DNS:a.example,email:ops@a.example'
dies 65 'mail.csr asks for .* neither a DNS name nor an IP address: ops@a.ex' \
    'step new-order -a account -r mail.csr'
request unnamed '/CN=a name' ''
dies 65 'unnamed.csr has no names' 'step new-order -a account -r unnamed.csr'
dies 64 'too many arguments' \
    'step new-order -a account -r names.csr a.example'
dies 66 'nowhere' 'step new-order -a account -r nowhere'
dies 65 'leaf.key is not a certificate request' \
    'step new-order -a account -r leaf.key'
# Keys of all types, and what BearSSL does not verify.
for type in ec256 ec384 rsa2048 rsa4096; do
	"$acme" key -t "$type" -o "$type.key"
	"$acme" csr -K "$type.key" a.example >"$type.csr"
	want='a.example ' asks "$type"
	openssl req -in "$type.csr" -outform DER -out whole.der
	{ head -c -9 whole.der; printf '123456789'; } >forged.csr
	dies 65 'signature of the certificate request forged.csr is not by' \
	    ": $type; step new-order -a account -r forged.csr"
	dies 65 'signature of the certificate request forged.csr is not by' \
	    ": $type; step finalize -r forged.csr <record"
done
openssl genpkey -algorithm ed25519 -out ed25519.key
request ed25519 / DNS:a.example
request ec384 / DNS:a.example -sha512
request rsa2048 / DNS:a.example -sha384
for name in ed25519 ec384 rsa2048; do
	want='a.example ' asks "$name"
done
# differs NAME WORDS: finalize says so before anything is sent.
differs() {
	rm -f www/requests
	dies 65 "the names of $1.csr differ from the order's: it $2" \
	    "step finalize -r $1.csr <record"
	check 'and nothing was asked' '[ ! -e www/requests ]'
}
request more / DNS:a.example,DNS:b.example
differs more 'has b.example, which is not asked for'
request other / DNS:b.example
differs other 'lacks a.example'
request wild / 'DNS:*.a.example'
differs wild 'lacks a.example'

group 'RFC 9773: the name of a certificate'
# cert_with EXTENSION SERIAL: a certificate with these, named.pem.
cert_with() {
	printf '%s\n' "subjectAltName=DNS:a.example" "$1" >extension
	openssl req -new -key leaf.key -subj / -out req.pem &&
	openssl x509 -req -in req.pem -signkey leaf.key -days 9 \
	    -set_serial "$2" -extfile extension -out named.pem 2>/dev/null
}
# The key identifier and the serial number of RFC 9773 4.1.
rfc9773=2.5.29.35=DER:301680146988\
5B6B87464041E1B37B847BA0AE2CDE01C8D4
check 'its example, a serial number with a leading zero' '
	fresh
	meta "\"renewalInfo\":\"$ca/ari\""
	answer GET_aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE "200 OK" \
	    "{\"suggestedWindow\":{\"start\":\"2025-01-02T04:00:00Z\",
	    \"end\":\"2025-01-03T04:00:00Z\"}}" "Retry-After: 21600"
	cert_with "$rfc9773" 0x87654321
	step renewal-info -d "$ca/dir" named.pem >out; got=$?; cat out
	[ $got = 0 ] && grep -x "retry-after 21600" out &&
	grep -x "window 2025-01-02T04:00:00Z 2025-01-03T04:00:00Z" out'
check 'new-order -R sends it' '
	answer POST_newOrder "201 Created" "$(order ready \
	    "\"replaces\":\"aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE\"")" \
	    "Location: $ca/order"
	step new-order -a account -R named.pem a.example >out && cat out &&
	part www/body.POST_newOrder.1 payload | from_base64url |
	    grep "\"replaces\":\"aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE\"" &&
	grep -x "replaces aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE" out'
check 'but not where the CA has no renewalInfo' '
	fresh
	answer POST_newOrder "201 Created" "$(order ready)" \
	    "Location: $ca/order"
	step new-order -a account -R named.pem a.example >out &&
	part www/body.POST_newOrder.1 payload | from_base64url >payload &&
	grep identifiers payload && ! grep replaces payload'
dies 77 renewalInfo 'step renewal-info -d "$ca/dir" named.pem'
# An authority key identifier of a serial number alone.
fresh
meta "\"renewalInfo\":\"$ca/ari\""
cert_with 2.5.29.35=DER:3003820101 1
dies 65 'no authority key identifier' \
    'step renewal-info -d "$ca/dir" named.pem'

group 'what real CAs do: quirks 1 to 6'

# Each of these quirks has been met.  They are numbered, and a test at the
# end sees that there is one for each.

# denies NAME STATUS WORDS CODE...: dies, under a name of its own.
denies() {
	quirk=$1 want=$2 words=$3
	shift 3
	code=$*
	check "$quirk: dies $want, $words" died
}
# payload FILE: what the JWS says.
payload() { part "$1" payload | from_base64url; }
no_body='Content-Length: 0\r\n\r\n'
error='"error":{"type":"urn:ietf:params:acme:error:connection",
"detail":"nobody there"}'
certificate="\"certificate\":\"$ca/certificate\""
respond() { step respond -t http-01 -w webroot "$@" <pending; }
issue ari root 'subjectAltName=DNS:a.example
authorityKeyIdentifier=keyid'
issue one root 'basicConstraints=critical,CA:TRUE'
issue two one 'basicConstraints=critical,CA:TRUE'
issue three two 'basicConstraints=critical,CA:TRUE'
cp leaf.key four.key
issue four three subjectAltName=DNS:a.example

fresh
answer POST_finalize '200 OK' "$(order processing)"
answer POST_order '200 OK' "$(order valid "$certificate")"
chain "$(cat leaf.pem)"
check 'quirk 1: finalize without a Location: the order is where it was' '
	finalize >out && diff out leaf.pem &&
	is 1 "grep -cx POST_order www/requests"'

for state in ready processing valid; do
	fresh
	answer POST_newOrder "$created" "{\"status\":\"$state\",
	    \"finalize\":\"$ca/finalize\"}" "Location: $ca/order"
	answer POST_order '200 OK' "$(order valid "$certificate")"
	answer POST_finalize '200 OK' "$(order valid "$certificate")"
	chain "$(cat leaf.pem)"
	check "quirk 2: newOrder replies with a bare order that is $state" '
	    new_order >out && cat out && grep -x "status $state" out &&
	    step finalize -K leaf.key <out >out3 && diff out3 leaf.pem &&
	    [ $state != ready ] || {
		step respond -t http-01 -w webroot <out >out2 &&
		step challenges <out2 | grep -x "status ready"; } &&
	    ! grep authz www/requests &&
	    case $state:$(grep -c finalize www/requests) in
	    processing:*|valid:0|ready:1) ;;
	    *) cat www/requests; exit 1 ;;
	    esac'
done

fresh
answer POST_newOrder "$created" '{"status":"ready","identifiers":[
{"type":"dns","value":"B.EXAMPLE"},{"type":"ip","value":"2001:DB8:0::1"},
{"type":"dns","value":"a.Example"},{"type":"dns","value":"a.example"}],
"finalize":"'"$ca/finalize"'"}' "Location: $ca/order"
check 'quirk 3: identifiers in another order and case, some twice' '
	step new-order -a account A.example a.example b.example \
	    2001:db8::1 >out && cat out &&
	is "dns a.example,dns b.example,ip 2001:db8::1" \
	    "sed -n \"s/^identifier //p\" out | sort | paste -s -d ,"'
sed 's/^identifier .*/identifier dns A.Example/' pending >capitals
answer POST_order '200 OK' "$(order ready)"
check 'quirk 3: capitals in a record that somebody wrote' '
	step order <capitals >out && grep -qx "status ready" out'

fresh
answer POST_authz '200 OK' '{"identifier":{"type":"dns",
"value":"a.example"},"challenges":[{"type":"new-99"},
{"type":"dns-persist-01","url":"'"$ca/p"'","accounturi":
"'"$ca/account/1?x=y"'","issuer-domain-names":["ca.example"]},
'"$(one http-01)"']}'
check 'quirk 4: unknown challenge types, one without token, no status' '
	challenges >out && cat out && is 2 "grep -c ^challenge out" &&
	grep "^challenge dns-persist-01 .* ca.example; accounturi=$ca" out &&
	grep "^challenge http-01 .* $token" out'

# linked HEADER...: the alternate chain is found with these.
linked() {
	answer POST_certificate '200 OK' "$(cat leaf.pem)
" "$@"
	check "quirk 5: links in headers of any shape: $*" '
	    finalize -i middle >out && diff out deep-leaf.pem'
}
fresh
answer POST_finalize '200 OK' "$(order valid "$certificate")"
answer POST_alt '200 OK' "$(cat deep-leaf.pem)
"
linked "Link: <$ca/alt>;rel=\"alternate\""
linked "LINK:<$ca/alt>; REL=Alternate"
linked "link: <$ca/dir>;rel=\"index\"" "link: <$ca/alt>;rel=\"alternate\""
linked "Link: <$ca/dir>;rel=\"index\", <$ca/alt>;rel=\"alternate\""
linked "Link: <$ca/a,b>;rel=\"up\",<$ca/alt> ; rel = alternate"
linked "Link: <$ca/alt>;title=\"a, b; c <d>\\\"\";rel=\"up alternate\""
linked 'Link: </alt>;rel="alternate"'
linked "Link: <//localhost:$home/alt>;rel=\"alternate\""
linked 'Link: x, ;,<>, "' 'Link: <x>;rel' 'Link: </alt>;rel=alternate'
for link in 'http://localhost/alt' nonsense ''; do
	answer POST_certificate '200 OK' "$(cat leaf.pem)
" "Link: <$link>;rel=\"alternate\""
	denies "quirk 5: a link to <$link>" 76 link 'finalize -i middle'
done

fresh
answer POST_finalize '202 Accepted' "$(order processing)" 'Retry-After: 1'
answer POST_order.1 '200 OK' "$(order processing)" \
    "Retry-After: $(date -u -d '2 seconds' '+%a, %d %b %Y %T GMT')"
answer POST_order.2 '200 OK' "$(order processing)" 'Retry-After: -1'
answer POST_order '200 OK' "$(order valid "$certificate")"
chain "$(cat leaf.pem)"
check 'quirk 6: Retry-After in seconds, as a date, negative, absent' '
	finalize >out && diff out leaf.pem'
for status in '429 x' '503 x'; do
	answer POST_finalize "$status" "$(order processing)" \
	    'Retry-After: 86400'
	denies "quirk 6: Retry-After of a day, with $status" 75 \
	    'after 86400 s' finalize
done
rm -f www/POST_order.[12]
for status in '200 OK' '202 Accepted'; do
	answer POST_finalize "$status" "$(order processing)" \
	    'Retry-After: 86400'
	check "quirk 32: Retry-After of a day for what takes seconds, $status" '
		finalize >out && diff out leaf.pem'
	answer POST_order '200 OK' "$(order processing)" 'Retry-After: 86400'
	denies "quirk 32: but it never comes, $status" 75 'after 86400 s' \
	    finalize -T 2
	answer POST_order '200 OK' "$(order valid "$certificate")"
done

group 'what real CAs do: quirks 7 and 8'

fresh
raw POST_it.1 'HTTP/1.1 400 x\r\nContent-Length: 46\r
\r\n{"type":"urn:ietf:params:acme:error:badNonce"}'
raw POST_it "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
raw HEAD_newNonce "HTTP/1.1 405 x\r\n$no_body"
raw GET_newNonce.1 "HTTP/1.1 200 x\r\nReplay-Nonce: by_get\r\n$no_body"
raw GET_newNonce 'HTTP/1.1 204 x\r\nReplay-Nonce: by_get2\r\n\r\n'
check 'quirk 7: badNonce without a nonce; newNonce by GET, 200 or 204' '
	is hello "get it" && protected www/body.POST_it.2 | grep by_get2'

fresh
answer POST_html '502 x' '<html>no</html>' 'Content-Type: text/html'
later html 'step get -T 9 -a account "$ca/html"'
answer POST_busy '503 x' '<html>busy</html>' 'Retry-After: 3'
answer POST_plain '403 x' "$(problem unauthorized ',"detail":"go away",
"status":null,"instance":null,"subproblems":null')" \
    'Content-Type: text/plain; charset=utf-8'
answer POST_odd '400 x' '{"type":null,"detail":"odd"}'
# The last is tried again, as any error of a server is.
types='409:alreadyReplaced 409:conflict 400:malformed 403:unauthorized
500:serverInternal'
for type in $types; do
	refusal=${type%:*} type=${type#*:} again=2
	[ "$type" != serverInternal ] || again=4
	answer "GET_$type" '200 OK' "{$(endpoint Nonce),
	    \"newOrder\":\"$ca/$type\",\"renewalInfo\":\"$ca/ari\"}"
	answer "POST_$type" "$refusal x" "$(problem "$type" '')"
	answer "POST_$type.$again" "$created" "$(order ready)" \
	    "Location: $ca/order"
	printf '%s\n' "account $ca/account/1" end >"of-$type"
	later "$type" "step new-order -v -T 9 -d $ca/$type -a of-$type \
	    -R ari.pem a.example"
done
settle
denies 'quirk 8: an HTML page for 502' 69 502 'replay html'
denies 'quirk 8: an HTML page for 503' 75 'after 3 s' \
    'step get -T 2 -a account "$ca/busy"'
denies 'quirk 8: a problem of another content type, with nulls' 77 \
    'unauthorized: go away' 'get plain'
denies 'quirk 8: a problem without type and status' 77 odd 'get odd'
for type in $types; do
	type=${type#*:} again=2
	[ "$type" != serverInternal ] || again=4
	check "quirk 8: replaces is refused with $type: then without" '
	    replay $type >out; got=$?; cat out; [ $got = 0 ] &&
	    grep "retrying without replaces.*$type" $type.err &&
	    payload www/body.POST_$type.1 | grep replaces &&
	    ! payload www/body.POST_$type.$again | grep replaces'
done

group 'what real CAs do: quirks 9 to 13'

fresh
answer POST_newOrder "$created" "$(order ready "\"big\":$(seq -s '' 60),
\"expires\":null,\"x\":{\"y\":[null,1e99]}" |
    sed 's|/|\\/|g; s|/finalize"|/fin\\u0061l\\u0069ze"|')" \
    "Location: $ca/order"
check 'quirk 9: escapes, nulls, unknown members and big integers' '
	grep -F "fin\\u0061l" www/POST_newOrder && new_order >out &&
	cat out && grep -Fx "finalize $ca/finalize" out'

answer POST_newAccount "$created" '{"status":"valid"}' \
    "Location: $ca/account/1"
check 'quirk 10: no null goes out, no contact that nobody asked for' '
	rm -f www/requests
	new_order && step new-account -d "$ca/dir" -y &&
	payload www/body.POST_newOrder.1 >a && cat a &&
	payload www/body.POST_newAccount.1 >b && cat b &&
	! grep -e null -e notBefore -e notAfter -e profile a &&
	! grep -e null -e contact b'
check 'quirk 10: but an empty contact that was asked for' '
	rm -f www/requests
	step new-account -d "$ca/dir" -y -m "" &&
	payload www/body.POST_newAccount.1 | grep "\"contact\":\[\]"'
answer POST_newAccount '200 OK' '{"status":"valid","contact":["mailto: x@y",
"mailto:a@b.example",7,"mailto:z\nstatus valid"]}' "Location: $ca/account/1"
for command in 'new-account -y' account; do
	check "quirk 37: a contact that cannot be a line: $command" '
		step $command -d "$ca/dir" >out 2>err; got=$?; cat out err
		[ $got = 0 ] && is "contact mailto:a@b.example" \
		    "grep ^contact out" && is 3 "grep -c left.out err" &&
		grep "^acme-step: .*: warning: .* left out: mailto: x@y$" err'
done
for list in '' ',"contact":[]' ',"contact":["mailto:C@b.example"]'; do
	answer POST_newAccount '200 OK' '{"status":"valid"'"$list}" \
	    "Location: $ca/account/1"
	check "-v says which contacts the CA dropped: $list" '
		step new-account -d "$ca/dir" -y -m mailto:a@b.example \
		    -m mailto:c@b.example -v >out 2>err; got=$?; cat err
		case $list in *C@*) n=1 ;; *) n=2 ;; esac
		[ $got = 0 ] && is $n "grep -c \"not list the contact\" err" &&
		grep "not list the contact mailto:a@b.example" err &&
		step new-account -d "$ca/dir" -y -m mailto:a@b.example 2>err &&
		[ ! -s err ]'
done

fresh
answer POST_finalize '200 OK' "$(order valid "$certificate")"
answer POST_certificate '200 OK' "$(printf 'subject=x\r\n'
    sed 's/$/\r/' four.pem; printf 'issuer=y\n\n'; cat three.pem
    printf '\r\n\r\n'; cat two.pem one.pem)"
check 'quirk 11: four certificates, CR LF, text between, no end of line' '
	finalize >out && cat four.pem three.pem two.pem one.pem | diff - out'
chain "$(cat leaf.pem account.key)"
denies 'quirk 11: another PEM block in the chain' 76 'PRIVATE KEY' finalize

fresh
answer POST_newAccount "$created" '{"status":"valid"}' \
    'Location: /acme/acct/7?a=b&c='
answer POST_it '200 OK' hello
check 'quirk 12: the kid is the Location, with its query' '
	step new-account -d "$ca/dir" -y -o queried && cat queried &&
	is hello "step get -a queried \"$ca/it\"" &&
	protected www/body.POST_it.1 |
	grep -F "\"kid\":\"$ca/acme/acct/7?a=b&c=\""'

fresh
answer POST_finalize '403 x' "$(problem orderNotReady '')"
answer POST_order '200 OK' "$(order valid "$certificate")"
chain "$(cat leaf.pem)"
check 'quirk 13: a second finalize is orderNotReady: the order decides' '
	finalize >out && diff out leaf.pem &&
	is 1 "grep -c finalize www/requests"'
fresh
answer POST_finalize.1 '403 x' "$(problem orderNotReady '')"
answer POST_order '200 OK' "$(order ready)"
answer POST_finalize '200 OK' "$(order valid "$certificate")"
chain "$(cat leaf.pem)"
check 'quirk 13: orderNotReady while all settles: it is tried again' '
	finalize >out && diff out leaf.pem &&
	is 2 "grep -c finalize www/requests"'
fresh
auth authz pending "$(one http-01)"
answer POST_chall.1 '409 x' "$(problem conflict '')"
answer POST_chall '200 OK' "$(one http-01 ',"status":"valid"')"
answer POST_order '200 OK' "$(order ready)"
check 'quirk 13: a second POST to a challenge is 409: its state decides' '
	respond >out && grep -x "status ready" out'
answer POST_chall '409 x' "$(problem malformed ',"detail":"never"')"
denies 'quirk 13: a challenge that is 409 and stays pending' 77 never \
    'respond'
fresh
answer POST_finalize.1 '200 OK' "$(order ready)"
answer POST_order '200 OK' "$(order valid "$certificate")"
chain "$(cat leaf.pem)"
check 'quirk 13: finalize leaves the order ready: it is not sent again' '
	finalize >out && diff out leaf.pem &&
	is 1 "grep -c finalize www/requests"'

group 'what real CAs do: quirks 13 to 20'

# In the next ones it takes a while until the challenges are looked at.
fresh
# stuck NAME CHALLENGE: all stays pending, but for that.
stuck() {
	auth "authz-$1" pending "$2"
	auth "authz-$1.1" pending "$(one http-01 | sed "s/chall/chall-$1/")"
	answer "POST_chall-$1" '200 OK' "$(one http-01 ',"status":"pending"')"
	answer "POST_order-$1" '200 OK' "$(order pending)"
	sed "s/authz/authz-$1/; s/order\$/order-$1/" pending >"$1.record"
	mkdir -p "webroot-$1"
	later "$1" "step respond -T 9 -t http-01 -w webroot-$1 <$1.record"
}
stuck invalid "$(one http-01 ",\"status\":\"invalid\",$error")"
stuck silent "$(one http-01 ',"status":"invalid"')"
stuck retried "$(one http-01 ",\"status\":\"pending\",$error")"
stuck slow "$(one http-01 ",\"status\":\"processing\",$error")"
settle
denies 'quirk 14: a challenge is invalid, its authorization pending' 77 \
    'a.example: .*nobody there' 'replay invalid'
denies 'quirk 14: the same without an error' 77 \
    'a.example: its challenge is invalid' 'replay silent'
denies 'quirk 20: challenge, authorization and order stay pending' 77 \
    'a.example: .*nobody there' 'replay retried'
within retried 3 8
denies 'quirk 20: the same, but processing: it may yet be' 75 \
    'a.example .*http-01 (.*nobody there' 'replay slow'
fresh
auth authz pending "$(one http-01 ",\"status\":\"pending\",$error")"
answer POST_chall '200 OK' "$(one http-01 ',"status":"valid"')"
answer POST_order '200 OK' "$(order ready)"
check 'quirk 20: to respond again is a new attempt' '
	respond >out && grep -x "status ready" out &&
	grep -x POST_chall www/requests'
auth authz pending "$(one http-01 ",\"status\":\"invalid\",$error"),
$(one dns-01)"
denies 'quirk 20: but not to a challenge that is invalid' 77 \
    'nobody there' respond
check 'quirk 20: another of the same authorization may do' '
	step challenges <pending >out && cat out &&
	is 1 "grep -c ^challenge out" && grep "^challenge dns-01" out'

group 'what real CAs do: quirks 15 to 21'

fresh
answer POST_it '400 x' "$(problem badSignatureAlgorithm ',"algorithms":
["RS256","ES384","EdDSA"]')"
denies 'quirk 15: badSignatureAlgorithm: which key would do' 77 \
    'RS256 (key -t rsa2048).*ES384 (key -t ec384).*accepts EdDSA;' 'get it'

fresh
auth authz pending "$(one http-01 | sed "s/$token/-$token/")"
runs POST_chall "cp ../webroot/-$token . && cat POST_plain"
answer POST_plain '200 OK' "$(one http-01)"
answer POST_order '200 OK' "$(order ready)"
check 'quirk 16: a token may begin with a dash' '
	respond >out && is "-$token.$print" "cat www/-$token"'
auth authz pending "$(one http-01 | sed "s/$token/..%2f$token/")"
denies 'quirk 16: but a token is base64url' 76 token respond
check 'quirk 16: and nothing is left of them' '[ -z "$(ls -A webroot)" ]'

fresh
redirect GET_old 307 /dir
check 'quirk 17: the directory redirects, once' '
	step directory -d "$ca/old" >out && grep "$ca/newOrder" out'
redirect GET_older 307 /old
denies 'quirk 17: but not twice' 78 307 'step directory -d "$ca/older"'
redirect GET_old 307 "http://localhost:$home/dir"
denies 'quirk 17: nor to http' 78 redirect 'step directory -d "$ca/old"'
redirect POST_it 307 "$ca/it2"
denies 'quirk 17: and no POST is sent on' 76 redirect 'get it'

fresh
raw HEAD_newNonce.1 \
    'HTTP/1.0 200 OK\r\nConnection: close\r\nReplay-Nonce: n0\r\n\r\n'
: >www/HEAD_newNonce.close
raw POST_it.1 "${chunked}2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
closing POST_it 'HTTP/1.0 200 OK\r\n\r\nhello'
check 'quirk 18: chunked, without a length, HTTP/1.0, closed each time' '
	is hello "get it" && is hello "get it" &&
	for file in www/head.*; do
		grep -i "^user-agent: acme-step/" "$file" || exit
	done && for file in www/head.POST*; do
		grep -ix "content-length: [1-9][0-9]*" "$file" || exit
	done'

fresh
for path in '' /; do
	answer GET_ '200 OK' "${directory%\}},\"meta\":null}"
	check "quirk 19: a directory at https://HOST$path, its meta null" "
	    step directory -d '$ca$path' >out && grep '$ca/newOrder' out"
done

fresh
answer POST_order '200 OK' "$(order invalid)"
auth authz invalid "$(one http-01 ",\"status\":\"invalid\",$error")"
denies 'quirk 21: an invalid order without an error: the challenge says' \
    77 'a.example: .*nobody there' 'step order -W <pending'

fresh
internal='{"type":"urn:ietf:params:acme:error:serverInternal",
"detail":"Could not communicate with VA"}'
answer POST_order '200 OK' "$(order invalid "\"error\":$internal")"
auth authz valid "$(one http-01)"
denies 'an order that the CA itself spoilt' 69 \
    'communicate with VA.*place a new order' 'step order -W <pending'
answer POST_order '200 OK' "$(order invalid)"
auth authz invalid "$(one http-01 ",\"status\":\"invalid\",
\"error\":$internal")"
denies 'a challenge that the CA could not try' 69 \
    'communicate with VA.*place a new order' 'step order -W <pending'
auth authz invalid "$(one http-01 ",\"status\":\"invalid\",
\"error\":$internal"),$(one dns-01 ",\"status\":\"invalid\",$error")"
denies 'but another challenge failed for a reason' 77 \
    'nobody there' 'step order -W <pending'

# seeks TYPE TXT: it fails, and the message names the TXT record.
seeks() {
	auth authz invalid "$(one "$1" ",\"status\":\"invalid\",$error")"
	denies "a failed $1 names its TXT record" 77 "nobody there (TXT record\
 $2); acme-step challenges prints what to" 'step order -W <pending'
}
seeks dns-01 _acme-challenge.a.example
seeks dns-account-01 '_[a-z2-7]\{16\}._acme-challenge.a.example'
seeks dns-persist-01 _validation-persist.a.example
auth authz invalid "$(one dns-01 ",\"status\":\"invalid\",$error")"
denies 'or the one of the record, which an alias names' 77 \
    'there (TXT record alias.example); ' '{ cat pending
	echo "challenge dns-01 dns a.example $ca/c alias.example x"
    } | step order -W'
auth authz invalid "$(one dns-01 ',"status":"invalid",
"error":{"type":"urn:ietf:params:acme:error:dns",
"detail":"no TXT at _acme-challenge.a.example"}')"
denies "or leaves it to the CA's words" 77 \
    'no TXT at _acme-challenge.a.example; acme-step challenges' \
    'step order -W <pending'

group 'what real CAs do: quirks 22 to 28'

for state in pending processing valid; do
	fresh
	auth authz pending "$(one http-01)"
	answer POST_plain '200 OK' "$(one http-01 ",\"status\":\"$state\"")"
	runs POST_chall '[ '$state' != valid ] || sleep 1; cat POST_plain'
	answer POST_order '200 OK' "$(order ready)"
	check "quirk 22: the reply to a challenge's POST is $state" '
	    respond >out && grep -x "status ready" out'
done

fresh
answer POST_newOrder "$created" "$(order ready)" "Location: $ca/order"
answer POST_finalize '200 OK' "$(order valid "$certificate")"
chain "$(cat leaf.pem)"
check 'quirk 23: the same order again with 201; a second finalize is 200' '
	new_order >out && new_order >out2 && diff out out2 &&
	finalize >out3 && step finalize -K leaf.key <record | diff out3 -'

fresh
{ cat pending; echo "authorization $ca/authz2"
echo 'identifier dns b.example'; } >both.record
auth authz pending "$(one tls-alpn-01),$(one dns-01),$(one http-01)"
auth authz2 valid "$(one http-01 ',"status":"valid"'),$(one dns-01 \
    ",\"status\":\"pending\",$error")"
sed -i s/a.example/b.example/ www/POST_authz2
check 'quirk 24: one token for all, in any order; some left pending' '
	step challenges <both.record >out && cat out &&
	is 3 "grep -c \"^challenge .* a.example\" out" &&
	is 3 "grep -c ^challenge out"'
auth authz valid ''
check 'quirk 24: those of a valid authorization have vanished' '
	step challenges <both.record | not grep ^challenge'

fresh
answer POST_newOrder "$created" "$(order ready '"profile":"tls"' |
    sed s/a.example/A.example/)" "Location: $ca/order"
check 'quirk 25: capitals kept, and a profile that nobody asked for' '
	new_order >out && cat out && grep -x "profile tls" out &&
	grep -x "identifier dns a.example" out'
meta '"xYz":"https://a.example/r","meta":{"termsOfService":
"data:text/plain,Do%20what%20thou%20wilt"}'
check 'quirk 25: terms of service as data: URL, members of random names' '
	step directory -d "$ca/dir" >out && cat out &&
	grep -Fx "terms-of-service data:text/plain,Do%20what%20thou%20wilt" \
	    out && ! grep xYz out'

fresh
answer POST_finalize '200 OK' "$(order valid "$certificate")" \
    'Content-Type: application/json; charset=utf-8'
{ printf "$ok"; printf 'Content-Type: application/pem-certificate-chain; '
printf 'charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n'
for file in deep-leaf.pem middle.pem; do
	printf '%x\r\n' $(($(wc -c <$file) + 1))
	cat $file
	printf '\n\r\n'
done
printf '0\r\n\r\n'; } >www/POST_certificate
check 'quirk 26: chunks, charset, a blank line between certificates' '
	finalize >out && diff out chain.pem'
raw POST_it 'HTTP/1.1 404 x\r\nContent-Type: text/plain\r
Content-Length: 4\r\n\r\nnone'
denies 'quirk 26: 404 as plain text' 77 404 'get it'
answer POST_order '200 OK' ''
denies 'quirk 26: 200 and empty for what is not there' 76 JSON \
    'step order <record'

fresh
for reply in "403:$(problem userActionRequired '')" \
    "400:$(problem malformed ',"detail":"agree to the terms"')"; do
	answer POST_newAccount "${reply%%:*} x" "${reply#*:}"
	denies "quirk 27: terms not agreed to: ${reply%%:*}" 77 \
	    'terms' 'step new-account -d "$ca/dir"'
done
answer POST_newAccount "$created" '{"status":"valid"}' \
    "Location: $ca/account/1"
check 'quirk 27: or nothing at all' 'step new-account -d "$ca/dir"'

fresh
# listed URL: newAccount says that the orders are there.
listed() {
	answer POST_newAccount '200 OK' \
	    '{"status":"valid","orders":"'"$1"'"}' "Location: $ca/account/1"
}
account_orders() { step account -d "$ca/dir" | sed -n 's/^account-order //p'; }
listed "$ca/orders"
answer POST_orders '200 OK' "[\"$ca/1\",\"/2\"]"
check 'quirk 28: a list of orders that is a bare array' '
	is "$ca/1
$ca/2" account_orders'
answer POST_orders '200 OK' "{\"orders\":[\"$ca/1\"]}" \
    'Link: </dir>;rel="index"' 'Link: </page2>;rel="next"'
answer POST_page2 '200 OK' "[\"$ca/2\"]"
check 'quirk 28: on two pages' '
	is "$ca/1
$ca/2" account_orders'
answer POST_page2 '200 OK' \
    "$(seq 4000 | sed "s|.*|\"$ca/&\"|" | paste -s -d , | sed 's/.*/[&]/')"
check 'quirk 28: thousands of them' 'is 4001 "account_orders | wc -l"'
answer POST_orders '200 OK' '{}'
check 'quirk 28: none of them' 'listed /orders; is "" account_orders'
for url in "http://localhost:$home/orders" orders "$ca/a b"; do
	listed "$url"
	denies "quirk 28: orders at $url" 76 orders \
	    'step account -d "$ca/dir"'
done
answer GET_dir '200 OK' "${directory%\}},\"renewalInfo\":\"$ca/ari\"}"
id=$(step renewal-info -v -d "$ca/dir" ari.pem 2>&1 |
    sed -n 's|.*GET .*/ari/\(.*\): 404$|\1|p')
for code in 400 404; do
	raw "GET_$id" "HTTP/1.1 $code x\r\n$no_body"
	denies "quirk 28: the CA does not know a certificate: $code" 77 \
	    "$code" 'step renewal-info -d "$ca/dir" ari.pem'
done

group 'RFC 8555 7.4.1: an authorization without an order'

fresh
answer GET_dir '200 OK' "${directory%\}},$(endpoint Authz)}"
rm -rf webroot && mkdir webroot
# state NAME STATUS [CHALLENGE'S STATUS [MEMBERS]]: of an authorization.
state() {
	answer "POST_$1" '200 OK' '{"status":"'"$2"'","identifier":{"type":
"dns","value":"a.example"},"challenges":[{"type":"http-01",
"url":"'"$ca"'/chall",
"token":"'"$token"'","status":"'"${3-$2}"'"'"${4-}"'}]}'
}
answer POST_newAuthz "$created" '{"status":"pending"}' "Location: $ca/authz"
check 'new-authz: the name that the CA is asked for, and its record' '
    step new-authz -a account A.example >authz.rec; got=$?; cat authz.rec
    [ $got = 0 ] && part www/body.POST_newAuthz.1 payload | from_base64url |
    grep -Fx "{\"identifier\":{\"type\":\"dns\",\"value\":\"a.example\"}}" &&
    grep -x "identifier dns a.example" authz.rec &&
    grep -x "authorization $ca/authz" authz.rec && not grep "^order" authz.rec'
answer POST_chall '200 OK' '{"type":"http-01","status":"processing"}'
state authz pending
state authz.3 valid
check 'respond waits for it: it becomes valid' '
    rm -f www/requests
    step respond -w webroot <authz.rec >out; got=$?; cat out www/requests
    [ $got = 0 ] && grep -x "authorization $ca/authz" out &&
    is 3 "grep -c POST_authz www/requests" && [ -z "$(ls -A webroot)" ]'
# The CA asks for two seconds, which is longer than our first pause.
state authz.2 pending
sed 's/^Replay-Nonce/Retry-After: 2\r\n&/' www/POST_authz.2 >slow
mv slow www/POST_authz.2
check 'it waits as long as the CA asks for' '
    rm -f www/requests; start=$(date +%s%N)
    step respond -w webroot <authz.rec || exit
    ms=$((($(date +%s%N) - start) / 1000000)); echo "$ms"; [ $ms -ge 2000 ] &&
    is 3 "grep -c POST_authz www/requests"'
rm www/POST_authz.2
state authz.3 invalid invalid ',"error":{"detail":"no such file"}'
dies 77 'could not validate a.example: .*no such file' '
    rm -f www/requests; step respond -w webroot <authz.rec'
state authz.3 pending
dies 75 'waiting for the CA to validate: an authorization is still pending' '
    rm -f www/requests; step respond -T 2 -w webroot <authz.rec'
rm www/POST_authz.3

group 'ACME: challenges that cannot be answered'

fresh
authz '"type":"dns-01","token":"'$token'"'
dies 77 'offers no http-01 challenge for a.example, only tls-sni-09 dns-01$' \
    'challenges -t http-01'
dies 77 'the CA offers no challenge of a supported type' '
    authz "\"type\":\"odd-01\""; answer POST_order "200 OK" "$(order pending)"
    step respond -x true <pending'
# offers TEXT: an authorization that is pending, with these challenges.
offers() {
	answer POST_authz '200 OK' '{"status":"pending","identifier":
{"type":"dns","value":"a.example"}'"$1"'}'
}
offers ',"challenges":[]'
dies 77 'no http-01 challenge for a.example, nor any other$' \
    'challenges -t http-01'
offers ''
dies 76 'lacks the member challenges' challenges
offers ',"challenges":[{"url":"'"$ca"'/chall"}]'
dies 76 'lacks the member type' challenges
offers ",\"challenges\":[$(count 1251 '{"type":"x"}')]"
dies 70 'an order has more than 1250 challenges' challenges
state authz invalid pending
dies 77 'a.example: its authorization is invalid' challenges
authz '"type":"dns-persist-01","issuer-domain-names":["ca.example"],
"accounturi":"'"$ca"'/account/2"'
dies 76 "a challenge for another account: $ca/account/2" challenges
both="challenge http-01 dns a.example $ca/chall $token $token.$print
challenge dns-01 dns a.example $ca/chall2 _acme-challenge.a.example $digest"
{ sed '$d' pending; echo "$both"; echo end; } >both.rec
dies 64 'a.example has several challenges; .* with -t: http-01 dns-01$' \
    'step respond <both.rec'
dies 64 '-l needs -t' 'step respond -l 127.0.0.1:1 <both.rec'
dies 77 'no tls-alpn-01 challenge for a.example, only http-01 dns-01$' \
    'step respond -t tls-alpn-01 -l 127.0.0.1:1 <both.rec'
dies 70 'more than 250 challenges' '
    { sed "\$d" pending; yes "$both" | head -n 502; echo end; } |
    step respond -t dns-01 -x true'
state plain pending
runs POST_authz 'sleep 3; cat POST_plain'
dies 75 'too little of -T is left for -s; raise -T' \
    'step respond -w webroot -s 3 <pending'
check 'and nothing stays published' '[ -z "$(ls -A webroot)" ]'

group 'ACME: records, orders and accounts that do not fit'

fresh
for word in order status finalize; do
	dies 65 "a second '$word' line" "sed 's/^$word .*/&\\
&/' record | step order"
done
dies 65 "'account' differs from the record on standard input" '
    sed "s|^account .*|&2|" account >account2; step order -a account2 <record'
dies 70 'more than 1024 lines with unknown keywords' '
    { sed "\$d" record; seq 1025 | sed "s/^/x-line /"; echo end; } | step order'
check '1024 such lines are kept' '
    answer POST_order "200 OK" "$(order ready)"
    { sed "\$d" record; seq 1024 | sed "s/^/x-line /"; echo end; } |
    step order >out; is 1024 "grep -c ^x-line out"'
check 'a record without names has those of its order' '
    answer POST_order "200 OK" "$(order ready)"
    grep -v ^identifier record | step order >out; cat out
    grep -x "identifier dns a.example" out'
answer POST_newOrder "$created" "$(order pending)" "Location: $ca/order"
dies 76 'is an order that lacks requested names' \
    'step new-order -a account a.example b.example'
answer POST_newOrder "$created" "$(order invalid \
    '"error":{"type":"x","detail":"never"}')" "Location: $ca/order"
state authz invalid
dies 77 'the order is invalid: .*a.example: its challenge' 'new_order'
answer GET_dir '200 OK' "${directory%\}},\"meta\":{\"profiles\":[\"classic\"]}}"
dies 77 "the CA has no profile 'classic', nor any other" \
    'step new-order -p classic -a account a.example'
answer POST_order '200 OK' "$(order processing)"
dies 75 'the order is processing: it has no certificate yet' \
    'step certificate <record'
check 'finalize asks for the status that its record lacks' '
    rm -f www/requests; answer POST_order "200 OK" "$(order invalid)"
    grep -v ^status record | step finalize -K leaf.key 2>err; got=$?
    cat err; [ $got = 77 ] && is POST_order "grep -m 1 POST www/requests"'
answer POST_order '200 OK' "$(order ready)"
error finalize orderNotReady
dies 77 orderNotReady 'step finalize -T 1 -K leaf.key <record'
answer POST_order '200 OK' "$(order pending)"
state authz valid
check 'deactivate-authz finds the authorizations of the order' '
    rm -f www/requests
    grep -v ^authorization record | step deactivate-authz >out; got=$?
    cat out; [ $got = 0 ] && not grep ^authorization out &&
    part www/body.POST_authz.2 payload | from_base64url |
	grep -Fx "{\"status\":\"deactivated\"}"'
answer POST_newAccount '200 OK' '{"status":"valid","orders":"'"$ca"'/orders"}' \
    "Location: $ca/account/1"
answer POST_orders '200 OK' 'none'
dies 76 'is not JSON' 'step account -d "$ca/dir"'
answer POST_orders '200 OK' '{"orders":[7]}'
dies 76 'has an order that is not a URL' 'step account -d "$ca/dir"'
"$acme" key -o other.new.key
answer POST_change '200 OK' '{}'
answer POST_newAccount '429 Too Many Requests' "$(problem rateLimited)"
dies 75 'rateLimited.*run it again to learn which is the account key' \
    'step key-change -a account -K other.new.key'
for text in 'POST https://localhost/x HTTP/1.1\r\nContent-Length: x\r\n\r\n' \
    'POST https://localhost/x HTTP/1.1\r\nContent-Length: 3\r\n\r\nab' \
    'PUT https://localhost/x HTTP/1.1\r\n\r\n' 'GET http://localhost/\r\n\r\n'
do
	rm -rf box && mkdir box
	# shellcheck disable=SC2059	# escapes
	printf "$text" >box/1.request
	dies 65 '1.request in box is not a request' 'step send box'
done
dies 66 'cannot open 1.request in box: ' '
    rm -f box/1.request; ln -s 1.request box/1.request; step send box'

group 'TLS: anchors of all kinds'

fresh
answer GET_dir '200 OK' "$(printf %s "$directory" | sed "s|$ca||g")"
for bits in 2048 4096; do
	openssl req -x509 -newkey "rsa:$bits" -nodes -subj /CN=rsa \
	    -keyout "anchor$bits.key" -out "anchor$bits.pem" 2>/dev/null
	issue "by-rsa$bits" "anchor$bits" "$here"
	serve "by-rsa$bits"
	check "an RSA key of $bits bits, as an anchor" '
	    step directory -C "anchor$bits.pem" \
		-d "https://localhost:$port/dir"'
	dies 78 'signature in its chain is wrong\|does not chain' '
	    openssl req -x509 -newkey "rsa:$bits" -nodes -subj /CN=rsa \
		-keyout wrong.key -out wrong.pem 2>/dev/null
	    step directory -C wrong.pem -d "https://localhost:$port/dir"'
done
for i in $(seq 16); do
	root alike -subj /CN=rsa && cat alike.pem
done >alike16.pem
check 'the right one of sixteen anchors of a name' '
    { tail -n +1 alike16.pem | awk "/BEGIN/ { n++ } n < 16"; cat anchor4096.pem
    } >alike.pem &&
    step directory -C alike.pem -d "https://localhost:$port/dir"'
dies 70 "more than 16 trust anchors match the server's chain" '
    cat alike16.pem anchor4096.pem >alike.pem
    step directory -C alike.pem -d "https://localhost:$port/dir"'

group 'system calls that fail before a CA'

# at_ca FAULTS COMMAND...: with these.
at_ca() {
	FAULT=$1 command=$2; shift 2
	export FAULT
	./faulty "$command" -C root.pem -k account.key -T 5 \
	    -H "localhost:$home:127.0.0.1" "$@"
}
dies 69 'Too many open files' 'at_ca "no socket" directory -d "$ca/dir"'
dies 70 'cannot wait for the network: ' \
    'at_ca "no poll" directory -d "$ca/dir"'
dies 70 'cannot start a process: ' \
    'at_ca "no fork" directory -P cat -d "$ca/dir"'
fresh
: >www/requests
rm -rf w && mkdir w
for fault in 'no data sync' 'no unlink'; do
	case $fault in
	'no unlink')	words="cannot remove .acme-step.* in w" ;;
	*)		words="cannot write $token in w" ;;
	esac
	check "-w where the file system has $fault" '
	    at_ca "$fault" respond -w w <http.rec 2>err; got=$?; cat err
	    [ $got = 74 ] && grep "^acme-step: respond: $words" err'
done
rm -rf w && mkdir w
dies 73 "cannot create $token in w: Input/output error" \
    'at_ca "links fail, no rename" respond -w w <http.rec'
check 'nothing stays there' '[ -z "$(ls -A w)" ]'
check 'a leftover that cannot be removed: a warning' '
    printf %s "$token.$print" >"w/$token"
    { cat record; grep ^challenge http.rec; } |
    at_ca "no unlink" respond -w w >out 2>err; got=$?; cat err
    [ $got = 0 ] && grep "cannot remove $token: Permission denied" err'
check 'and nothing was told' 'asked 0'
dies 74 'cannot write 1.request in box: ' '
    rm -rf box; at_ca "no data sync" directory -B box -d "$ca/dir"'
check 'and the box is empty' '[ -z "$(ls -A box)" ]'
dies 70 'cannot make a pipe: ' \
    'at_ca "no pipe" respond -x certbot:true,true <http.rec'
dies 70 'cannot start a process: ' \
    'at_ca "no fork" respond -x true <http.rec'
dies 70 'cannot wait for a process: ' '
    at_ca "no poll" respond -c -H a.example:80:127.0.0.1 -w w <http.rec'
check 'more than 1024 variables for a hook' '
    # shellcheck disable=SC2046	# one word each
    env $(seq 1024 | sed "s/.*/V&=/") "$acme" respond -C root.pem -T 5 \
	-k account.key -x certbot:true,true <http.rec 2>err; got=$?; cat err
    [ $got = 73 ] && grep ": more than 1024 environment variables$" err'
answer POST_chall2 '200 OK' '{"status":"pending","token":"a b"}'
dies 76 'has an invalid token: a b' '
    { sed "\$d" pending; echo "$both" | grep dns-01; echo end; } |
    step respond -x uacme:true'

group 'the limits (canned replies)'

l=$(head -c 63 /dev/zero | tr '\0' a)
set --
while [ $# -lt 250 ]; do
	set -- "$@" "n$#.$l.$l.$l.$(echo "$l" | head -c 48)"
done
printf '%s\n' "$@" >long-names
set --
check '250 names, 245 bytes each: csr' '
	"$acme" csr -K leaf.key $(cat long-names) >csr.pem &&
	openssl req -in csr.pem -noout -verify &&
	is 250 "openssl req -in csr.pem -noout -text | grep -o DNS:n | wc -l"'
fresh
error newOrder malformed ''
dies 77 malformed ': 250 long names
    step new-order -a account $(cat long-names)'
check 'and they were all in it' '
	is 250 "part www/body.POST_newOrder.1 payload | from_base64url |
	    grep -o value | wc -l"'
error finalize malformed ''
dies 77 malformed ': 250 long names
    { grep -v identifier record; sed "s/^/identifier dns /" long-names
    } | step finalize -K leaf.key'
# Two hundred and fifty authorizations that never come to anything.
{ grep -v -e identifier -e authorization pending
sed "s/^/identifier dns /" long-names
seq 250 | sed "s|.*|authorization $ca/authz|"; } >long-record
long=$(head -n 1 long-names)
answer POST_authz '200 OK' '{"status":"pending","identifier":{"type":"dns",
"value":"'"$long"'"},"challenges":[{"type":"http-01"},{"type":"dns-01"}]}'
answer POST_order '200 OK' "{\"status\":\"pending\",\"finalize\":\"$ca/x\"}" \
    'Retry-After: 9999'
later lacking 'step finalize -T 60 -K leaf.key <long-record'
answer POST_lost '200 OK' "{\"status\":\"invalid\"}"
answer POST_refused '200 OK' '{"status":"invalid","identifier":{"type":"dns",
"value":"'"$long"'"},"challenges":[{"error":{"detail":"nothing there"}}]}'
later losing 'sed "s/authz/refused/; s/order\$/lost/" long-record |
    step order -W -T 60'
check 'an array of ten thousand elements' '
	{ echo "[0"; yes ",\"a\\/b\"" | head -n 10000; echo "]"; } >json
	is 10001 "\"\$acme\" json . json | grep -c -e ^0 -e ^a/b"'
sed 's/^identifier dns \(.*\)/&\
challenge dns-01 dns \1 CA\/closes _x content/' long-record |
    sed "s|CA/closes|$ca/closes|" |
    awk '/^identifier/ && n++ > 40 { getline; next } { print }' >hooked
closing POST_closes ''
later hooking 'step respond -T 20 -x certbot:true,true <hooked'
settle
dies 75 'still needs one of.*still needs one of' \
    ': 250 are pending; replay lacking'
dies 77 'nothing there.*nothing there' ': 250 failed; replay losing'
check 'and the message counts those that it does not name' '
	cat losing.err lacking.err
	grep "nothing there, and 24[0-9] more$" losing.err &&
	grep "dns-01, and 24[0-9] more" lacking.err &&
	[ "$(wc -c <losing.err)" -lt 2100 ] &&
	[ "$(wc -c <lacking.err)" -lt 2100 ]'
dies 69 'connection to localhost ended' ': 40 certbot hooks; replay hooking'

set --
while [ $# -lt 251 ]; do set -- "$@" "n$#.example"; done
printf '%s\n' "$@" >many-names
set --
for command in 'csr -K leaf.key' 'due leaf.pem' \
    'new-order -C root.pem -k account.key -a account'; do
	dies 70 '250 names' "\"\$acme\" $command \$(cat many-names)"
done
check 'the same name again does not count' '
	"$acme" csr -K leaf.key $(yes a.example | head -n 300) >csr.pem'
fresh
answer POST_order '200 OK' "$(order pending | sed "s|\[\"[^]]*authz\"\]|[$(
    seq -s , 251 | sed "s|[0-9]*|\"$ca/&\"|g")]|")"
dies 70 '250 authorizations' 'step order <pending'
{ cat pending; sed "s|.*|challenge dns-01 dns & $ca/c x y|" many-names
} >many-challenges
dies 70 '250 names' 'step respond -t dns-01 <many-challenges'
dies 70 '10 contacts' '"$acme" account $(yes -- -mmailto:a@b | head -n 11)'
dies 70 '16 addresses' '"$acme" directory $(yes -- -Ha:1:::1 | head -n 17)'
misuse '"$acme" directory -T 2592001'
misuse 'step respond -s 2592001 <pending'
misuse '"$acme" directory -d "https://$(printf %0256d 0)/"'
dies 65 '256 KiB' 'head -c 300000 /dev/zero | "$acme" json .'
answer POST_finalize '200 OK' "$(order valid "$certificate")"
for i in 1 2 3 4 5 6 7 8 9 10; do
	cp root.key "root-$i.key"
	issue "root-$i" root 'basicConstraints=critical,CA:TRUE' -subj /CN=root
done
chain "$(cat leaf.pem root-?.pem root-10.pem)"
dies 70 'more than 10 certificates' finalize
chain "$(cat leaf.pem root-?.pem)"
check 'ten certificates are a chain' 'is 10 "finalize | grep -c BEGIN"'
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17; do
	cat root.pem
done >anchors.pem
dies 70 '16 trust anchors' 'step directory -C anchors.pem -d "$ca/dir"'
cp server.key long.key
{ cat server.pem; head -n $((10 * $(wc -l <root.pem))) anchors.pem
} >long-chain.pem
cp server.key big.key
issue big root "$here,$(seq -s , 1100 | sed 's/[0-9]*/DNS:&.big.example/g')"
for name in long-chain big; do
	serve "$name"
	dies 78 'too many or too large certificates' ": $name
	    step directory -d https://localhost:$port/dir"
done
meta "\"renewalInfo\":\"$ca/$(head -c 2000 /dev/zero | tr '\0' x)\""
dies 70 'https URL' 'step renewal-info -d "$ca/dir" ari.pem'
# Pages that go round and round.
answer POST_newAccount '200 OK' '{"status":"valid","orders":"/orders"}' \
    "Location: $ca/account/1"
answer POST_orders '200 OK' "[\"$ca/1\"]" 'Link: </orders>;rel=next'
dies 76 'names itself' 'step account -T 30 -d "$ca/dir"'
answer POST_orders '200 OK' "[\"$ca/1\"]$(head -c 20000 /dev/zero |
    tr '\0' ' ')" 'Link: </orders2>;rel=next'
answer POST_orders2 '200 OK' "[\"$ca/2\"]" 'Link: </orders3>;rel=next'
cp www/POST_orders www/POST_orders3
later paging 'step account -T 120 -d "$ca/dir"'
answer GET_busy '503 Busy' "$(head -c 250000 /dev/zero | tr '\0' x)" \
    'Retry-After: 0'
later refusing 'step directory -T 16 -d "$ca/busy"'
settle
dies 75 busy 'replay refusing'
dies 70 'more than 1000 pages' 'replay paging'
# A hundred Link headers, and as many chains to choose from.
set --
for i in $(seq 100); do
	set -- "$@" "Link: <$ca/certificate?$i>;rel=\"alternate\""
done
fresh
answer POST_order '200 OK' "$(order valid "$certificate")"
answer POST_certificate '200 OK' "$(cat leaf.pem
for i in 1 2 3 4 5 6 7 8 9; do cat root.pem; done)" "$@"
for i in $(seq 100); do
	cp www/POST_certificate "www/POST_certificate?$i"
done
set --
later choosing 'step certificate -T 120 -i nobody <record'
settle
dies 77 'only: root, root' 'replay choosing'
check 'each of a hundred chains was looked at' '
	[ "$(grep -c "certificate?" www/requests)" = 100 ]'

group 'records'

fresh
answer POST_order '200 OK' "$(order ready)"
order_of() { step order <"$1"; }
check 'order asks the CA' 'order_of pending >out && cat out &&
    grep -qx "status ready" out && grep -qx "order $ca/order" out'
check 'a record again gives the same' '
	order_of pending >out && order_of out >out2 && diff out out2'
check 'unknown lines pass through' '
	{ cat record; echo "x-mine  two  words"; echo alone; } >mine
	order_of mine >out && cat out && grep -qx "x-mine  two  words" out &&
	grep -qx alone out'
check 'and what is written ends with end, once' '
	is end "tail -n 1 out" && is 1 "grep -cx end out"'
check 'each beginning of a record is refused, and nothing is asked' '
	rm -f www/requests
	size=$(wc -c <record)
	for n in $(seq 1 7 "$size") $(seq $((size - 12)) $((size - 2))); do
		head -c "$n" record >part
		order_of part >out 2>err; got=$?
		[ "$got" = 65 ] && [ ! -s out ] &&
		grep -q "standard input is cut off: .* run the step" err ||
			{ echo "the first $n bytes: $got"; cat err; exit 1; }
	done
	[ ! -e www/requests ]'
check 'a record whose last newline alone is missing is whole' '
	head -c $(($(wc -c <record) - 1)) record >part
	order_of part >out && grep -qx "status ready" out'
# The step writes more than a pipe holds, and is killed meanwhile.
answer POST_order '200 OK' \
    "{\"status\":\"ready\",\"finalize\":\"$ca/finalize\"}"
check 'what a step that was killed has passed on is cut off' '
	{ "$acme" order -C root.pem -k account.key <long-record &
	echo $! >pid; wait; } |
	{ dd bs=1 count=300 of=part; kill -9 "$(cat pid)"
	await not kill -0 "$(cat pid)"; cat >>part; }
	wc -c part; [ "$(wc -c <part)" -gt 1 ] && grep "^order " part &&
	not grep -x end part'
check 'a reader that does not read is waited for until the time limit' '
	{ step order -T 2 <long-record 2>err; echo $? >status; } | sleep 8
	cat status err; [ "$(cat status)" = 74 ] &&
	grep "limit of 2 s reached while writing standard output" err'
dies 65 'standard input is cut off: it has no .end. line; run the step' \
    'step respond -w webroot <part'
dies 65 'part is cut off: it has no .end. line; run new-account again' \
    'sed "\$d" account >part; step get -a part "$ca/it"'
dies 65 'line 12: malformed' '{ cat record; echo end of it; } | step order'
answer POST_order '200 OK' "$(order ready)"
check 'the nonce of the record is spent' '
	rm -f www/requests
	order_of record >out &&
	protected www/body.POST_order.1 | grep "\"from_the_record\"" &&
	! grep newNonce www/requests'
# spoiled SED-SCRIPT: the record after it is bad input.
spoiled() {
	sed "$1" record >bad.record
	dies 65 . ": '$1'; order_of bad.record"
}
spoiled '/^order/d'
spoiled 's/^order .*/order/'
spoiled 's/^order .*/& x/'
spoiled 's/^order .*/order nonsense/'
spoiled 's/^order https/order http/'
spoiled 's/^order /order  /'
spoiled 's/^order.*/& /'
spoiled 's/^order.*/&\r/'
spoiled 's/$/\r/'
spoiled 's/^nonce.*/nonce a b/'
spoiled 's/^nonce.*/nonce "x"/'
spoiled 's/^new-nonce.*/new-nonce x/'
spoiled 's/^directory https/directory http/'
spoiled 's/^account .*/account x/'
spoiled 's/^status.*/status a b/'
spoiled 's/^identifier.*/identifier dns/'
spoiled 's/^identifier.*/identifier dns a b/'
spoiled 's/^identifier.*/identifier/'
spoiled 's/^identifier.*/challenge http-01 dns a.example/'
spoiled 's/^order/\x00order/'
spoiled 's/^order.*/&\x00/'
spoiled 's/^order.*/&\x1b[31m/'
spoiled 's/^status.*/failed x y z/'
dies 65 . 'order_of /dev/null'
dies 65 . 'step order </dev/null'
dies 65 . 'echo | step order'
dies 65 . 'head -c 2000000 /dev/zero | tr "\0" x | step order'
dies 65 . 'head -c 100000 /dev/urandom | step order'
dies 70 250 'yes "identifier dns a.example" | head -n 9999 | step order'
dies 65 . '{ cat record; printf "order $ca/"
	head -c 9000 /dev/zero | tr "\0" x; } | step order'
dies 66 'standard input' 'step order <&-'
dies 65 . 'step order -d "$ca/elsewhere" <record'
dies 65 . 'step get -a bad.record "$ca/it"'
dies 66 none 'step get -a none "$ca/it"'
dies 64 . 'step get -a account "http://localhost:$home/it"'
dies 74 . 'order_of record >&-'
dies 74 . 'order_of record >/dev/full'
dies 73 missing 'step order -o missing/out <record'

group 'pipes'

for shell in dash bash 'busybox ash'; do
	check "$shell: a step's status is its pipe's" "
		cat >pipe.sh <<-'END'
		\"\$1\" order -C root.pem -k account.key <bad.record 2>err |
		\"\$1\" respond -C root.pem -k account.key 2>err2 |
		\"\$1\" finalize -C root.pem -k account.key -K leaf.key
		END
		$shell pipe.sh \"\$acme\" >out; got=\$?
		cat err err2 out
		[ \$got = 65 ] && [ ! -s out ] && [ ! -s err2 ] && [ -s err ]"
done
check 'what a step that failed writes' '
	order_of bad.record 2>err | cat >out; cat out
	is 1 "wc -l <out" && grep "^failed 65 order [^ ]" out'
check 'and into a file it writes nothing' '
	order_of bad.record 2>err >out; [ ! -s out ]'
failed='failed 75 new-order some words'
for command in order challenges respond "finalize -K leaf.key" certificate
do
	check "$command after a failure" "
		echo '$failed' | step $command >out 2>err; got=\$?
		cat out err; [ \$got = 75 ] && [ ! -s out ] && [ ! -s err ]"
done
check 'a failure whose message is cut off keeps its status' '
	printf "failed 75 new-order some wo" | step order >out 2>err
	[ $? = 75 ] && [ ! -s out ] && [ ! -s err ]'
dies 65 'cut off' 'printf "failed 7" | step order'
check 'a failure passes on' '
	echo "$failed" | step order | cat >out; is "$failed" "cat out"'
check 'a failure touches no file' '
	echo "$failed" | step finalize -K leaf.key -o file.pem
	[ $? = 75 ] && is old "cat file.pem"'
dies 66 none.key 'echo "$failed" | step finalize -K none.key'
dies 73 missing 'echo "$failed" | step order -o missing/out'

# early STATUS WORDS COMMAND [OPTION]...: known before there is a record.
mkfifo awaited
exec 9<>awaited
early() {
	wanted_status=$1 wanted_words=$2 command=$3; shift 3
	dies "$wanted_status" "$wanted_words" "timeout 9 \"\$acme\" \
	    $command -C root.pem -k account.key $* <&9"
}
early 64 'exactly one of -K KEY and -r CSR is required' finalize
early 64 'exactly one of -K KEY and -r CSR' finalize -K leaf.key -r none.csr
early 66 none.key finalize -K none.key
(umask 077; cp root.pem no.key)
early 65 no.key finalize -K no.key
early 65 11.1 finalize -K account.key
early 66 none.csr finalize -r none.csr
early 65 root.pem finalize -r root.pem
early 73 missing finalize -K leaf.key -o missing/out
early 66 none.key order -k none.key
early 66 none.pem order -C none.pem
early 66 none.record order -a none.record
early 64 'http:' order -d http://x
early 64 'cannot be combined' respond -w . -x true
early 64 'dns-01' respond -t dns-01 -w .
early 64 'would be removed' respond -n -w .
early 64 '-s needs' respond -s x
early 64 'less than -T' respond -s 5 -T 5
early 64 'STYLE' respond -x certbot:x
check 'what is opened meanwhile is not left behind' '
	timeout 1 "$acme" finalize -C root.pem -k account.key -K leaf.key \
	    -o left.pem <&9; got=$?; ls -A
	[ $got = 124 ] && [ ! -e left.pem ] && ! ls -A | grep -F .acme-step'
exec 9<&-
mkfifo late
check 'a FIFO is not opened before there is a record' '
	{ sleep 2; echo "$failed"; } |
	step finalize -T 1 -K leaf.key -o late; [ $? = 75 ]'
# The same without a record: before the first request.
while read -r status command; do
	check "no request is sent: $command" "
		rm -f www/requests; echo '{}' |
		step ${command%% *} -d '$ca/dir' ${command#* }; got=\$?
		[ \$got = $status ] && [ ! -e www/requests ]"
done <<'END'
64 new-order -b noon a.example
64 new-order a,b
66 new-order -R none.pem a.example
64 new-authz a,b
66 revoke-cert none.pem
65 revoke-cert -K leaf.key root.pem
64 revoke-cert -c nonsense root.pem
66 renewal-info none.pem
66 key-change -K none.pem
65 key-change -K account.key
66 new-account -e none
65 new-account -e root.pem
64 get http://localhost/
64 post http://localhost/
END
check 'a reader that has gone is no crash' '
	{ order_of record 2>err; echo $? >status; } | true
	sleep 0.2; cat status err
	case $(cat status) in 0|74) ;; *) exit 1 ;; esac'

group 'pipes: what is known early'

# first_part, second_part: of the record, as an earlier step writes it.
first_part() { sed 3q record; }
second_part() { sed 1,3d record; }
# connected COUNT: so many connections came to the canned server.
connected() { is "$1" 'grep -c . www/connections'; }
fresh
answer POST_newOrder "$created" "$(order pending)" "Location: $ca/order"
mv www/POST_newOrder www/created
runs POST_newOrder 'for i in $(seq 50); do [ ! -e ../seen ] || break
    sleep 0.1; done; [ ! -e ../seen ] || cat created'
check 'a pipe gets what is known before the first response' '
    rm -f seen
    new_order | { head -n 3 >first; touch seen; cat >rest; }
    cat first rest; sed 3q record | diff - first &&
    grep "^order $ca/order$" rest && is end "tail -n 1 rest" &&
    not grep -e ^directory -e ^new-nonce -e "^account " rest'
answer POST_newOrder '403 Forbidden' "$(problem unauthorized)"
check 'the failed line follows it' '
    new_order 2>err | cat >out; cat out
    sed 3q record | diff - first && sed 3q out | diff first - &&
    is 4 "grep -c . out" && tail -n 1 out | grep "^failed 77 new-order "'
check 'and whoever reads that drops what came before' '
    step order <out >out2 2>err; [ $? = 77 ] && cat out2 err &&
    [ ! -s out2 ] && [ ! -s err ]'
check 'a step that is told of it passes on that line alone' '
    cat out | step order | cat >out2; tail -n 1 out | diff - out2'
check 'a file gets nothing early' 'new_order >out; [ $? = 77 ] && [ ! -s out ]'
check 'a box gets no early lines either' '
    new_order_in() { step new-order -a account -B early.box a.example; }
    new_order_in | cat >out; cat out; is 1 "grep -c . out" && grep ^failed out'

fresh
answer POST_order '200 OK' "$(order ready)"
check 'a step connects while it waits for the rest of its record' '
    rm -f seen
    { first_part; await test -s www/connections && touch seen
    second_part; } | step order >out && [ -e seen ] && cat out &&
    connected 1 && grep "^status ready" out'
check 'but nothing on standard output if the record goes elsewhere' '
    { first_part; sleep 0.5; second_part; } |
    step order -o /dev/null | cat >out; cat out; [ ! -s out ]'
check 'and passes on what it has read' '
    rm -f passed; : >passed
    { first_part; await test -s passed && touch seen; second_part; } |
    step order | { head -n 3 >passed; cat >rest; }
    cat passed rest; first_part | diff - passed && is end "tail -n 1 rest" &&
    not grep ^directory rest'
echo 'touch started; exec socat - "TCP:127.0.0.1:$1"' >started.sh
check 'but not with -P, whose command may ask for a password' '
    rm -f started none
    { first_part; sleep 1; [ -e started ] || touch none; second_part; } |
    step order -P "sh started.sh %p" >out && [ -e started ] && [ -e none ]'
check 'nor where there is nothing but a record' '
    rm -f www/connections; step order <record >out && connected 1'

# before PORT: the record, of a CA at that port.
before() { sed "s|localhost:$home|localhost:$1|" record >record.there; }
# there: such a record comes in two parts, with a pause between.
there() { sed 3q record.there; sleep "$1"; sed 1,3d record.there; }
front=$(free_port)
server_start socat -T 1 "TCP-LISTEN:$front,bind=127.0.0.1,fork,reuseaddr" \
    "TCP:127.0.0.1:$home"
up "$front"
before "$front"
answer POST_order '200 OK' "$(order ready | sed "s|:$home/|:$front/|g")"
check 'a CA that closes idle connections after a second' '
    there 3 | step order >out 2>err && cat out err && [ ! -s err ] &&
    grep "^status ready" out'
# The first connection gets no answer, each other one does.
front=$(free_port)
server_start socat "TCP-LISTEN:$front,bind=127.0.0.1,fork,reuseaddr" \
    "SYSTEM:mkdir first.there && sleep 60 || socat - TCP\\:127.0.0.1\\:$home"
up "$front"
before "$front"
answer POST_order '200 OK' "$(order ready | sed "s|:$home/|:$front/|g")"
check 'a CA that accepts, and answers only the next time' '
    rm -rf first.there; there 1 | step order >out 2>err && cat out err &&
    [ -d first.there ] && [ ! -s err ] && grep "^status ready" out'
silent() { rm -rf first.there; sed 3q record.there; sleep "$1"; echo "$2"; }
later silent 'silent 1 "$failed" | step order'
settle
check 'a failure that comes meanwhile is not delayed' '
    replay silent; [ $? = 75 ] && [ ! -s silent.err ] && [ ! -s silent.out ]'
within silent 1 3
check 'SIGTERM ends a step that connects early' '
    rm -f ended; silent 5 end | { exec 3<&0
	"$acme" order -C root.pem -k account.key <&3 2>err & pid=$!
	await test -d first.there; kill "$pid"; wait "$pid"; echo $? >ended; }
    cat err ended; is 143 "cat ended" && grep "ended by signal 15" err'
if [ "$(id -u)" = 0 ]; then
	cp "$acme" lone.bin && chmod 755 . lone.bin
	cp account.key lone.key && chmod 644 lone.key
	check 'SIGTERM ends it where no process can look the name up' '
	    sed "s/localhost:/name.test:/" record >record.there
	    silent 5 end | { exec 3<&0
		setpriv --reuid=65531 --regid=65531 --clear-groups bash -c "
		    ulimit -u 1; exec ./lone.bin order -C root.pem -k lone.key
		    " <&3 2>err & pid=$!
		sleep 1; kill "$pid"; wait "$pid"; echo $? >ended; }
	    cat err; is 143 "cat ended"'
	rm -f lone.bin lone.key
fi

fresh
answer POST_newOrder "$created" "$(order pending)" "Location: $ca/order"
cp www/GET_dir www/directory
runs GET_dir 'while IFS= read -r line; do case $line in HEAD*) next=$line ;;
    "$cr") break ;; esac; done; [ ! "$next" ] || cat directory HEAD_newNonce'
check 'the directory and a nonce are asked for in one write' '
    new_order | grep "^order "'
check 'but no nonce if none is needed' '
    fresh; step directory -a account -d "$ca/dir" >out && cat out &&
    not grep HEAD www/requests'

fresh
authz '"type":"http-01","token":"'$token'"'
answer POST_chall '200 OK' '{"type":"http-01","status":"valid"}'
answer POST_order '200 OK' "$(order ready)"
check 'a CA that validates at once is asked for the order once' '
    step respond -w webroot <pending >out && cat out www/requests &&
    grep "^status ready" out &&
    printf "%s\n" POST_authz HEAD_newNonce POST_chall POST_order |
    diff - www/requests'
answer POST_order '200 OK' "$(order pending)"
later polling 'step order -W <pending'
two='"identifiers":[{"type":"dns","value":"a.example"},
{"type":"dns","value":"b.example"}],"authorizations":["'$ca'/valid",
"'$ca'/open"],"finalize":"'$ca'/finalize"'
answer POST_order2 '200 OK' "{\"status\":\"pending\",$two}"
answer POST_valid '200 OK' '{"status":"valid","identifier":
{"type":"dns","value":"a.example"},"challenges":[]}'
answer POST_open '200 OK' '{"status":"pending","identifier":
{"type":"dns","value":"b.example"},"challenges":[]}'
sed "s|$ca/order|&2|; s|^authorization.*|authorization $ca/valid\\
authorization $ca/open|; s/^identifier.*/&\\
identifier dns b.example/; s/ready/pending/" record >two.pending
later looking 'step order -W -T 15 <two.pending'
# This one is idle for longer than a NAT may remember it.
front=$(free_port)
server_start socat -d -d -lf idle.log \
    "TCP-LISTEN:$front,bind=127.0.0.1,fork,reuseaddr" "TCP:127.0.0.1:$home"
up "$front"
before "$front"
answer POST_order.idle '200 OK' "$(order ready | sed "s|:$home/|:$front/|g")"
mv www/POST_order.idle www/POST_idle
sed -i "s|/order$|/idle|" record.there
later idle 'there 22 | step order'
settle
check 'a connection that was idle for long is made again' '
    replay idle && is 2 "grep -c \"accepting connection\" idle.log"'
dies 75 'b.example still needs' 'replay looking'
check 'only what is pending is looked at again' '
    sort www/requests | uniq -c; grep -c POST_open www/requests >open
    grep -c POST_valid www/requests >valid
    is 2 "cat valid" && [ "$(cat open)" -gt 2 ]'
dies 75 'still pending' 'replay polling'
check 'a pending order is not fetched too often' '
    n=$(grep -cx POST_order www/requests); echo "$n"
    [ "$n" -ge 6 ] && [ "$n" -le 16 ]'

cd "$tmp" || exit 1

world_start

# The whole way, for all kinds of names and keys.
issuance() {
	rm -f ./*.key.pem
	unset ACME_ACCOUNT
	ACME_KEY=$tmp/account.key.pem
	export ACME_KEY

	check 'an account' '
	    acme-step key -o "$ACME_KEY" &&
	    acme-step new-account -y -m mailto:ops@example.com -o account &&
	    [ "$(field directory account)" = "$ACME_DIRECTORY" ] &&
	    grep "^new-nonce https://" account &&
	    grep "^account https://" account'
	ACME_ACCOUNT=$tmp/account
	export ACME_ACCOUNT

	check 'one name' '
	    acme-step key -o one.key.pem &&
	    acme-step new-order one.test |
	    acme-step respond -t http-01 -w "$www" |
	    acme-step finalize -K one.key.pem -o one.pem &&
	    issued one.key.pem one.pem DNS:one.test'
	check 'nothing is left in the web server' '
	    [ -z "$(ls "$www")" ]'
	check 'three names' '
	    acme-step new-order b.test a.test c.a.test |
	    acme-step respond -t http-01 -w "$www" |
	    acme-step finalize -K one.key.pem -o three.pem &&
	    issued one.key.pem three.pem DNS:a.test DNS:b.test DNS:c.a.test'
	check 'a wildcard and its base, by DNS' '
	    acme-step new-order "*.wild.test" wild.test |
	    acme-step challenges -t dns-01 >wild &&
	    [ "$(grep -c "^challenge dns-01 dns .* _acme-challenge.wild.test " \
		wild)" = 2 ] && publish <wild &&
	    acme-step respond -t dns-01 <wild |
	    acme-step finalize -K one.key.pem -o wild.pem &&
	    issued one.key.pem wild.pem "DNS:*.wild.test" DNS:wild.test'
	check 'an IP address' '
	    acme-step new-order 127.0.0.1 | tee ip |
	    acme-step respond -t http-01 -w "$www" |
	    acme-step finalize -K one.key.pem -o ip.pem &&
	    grep -x "identifier ip 127.0.0.1" ip &&
	    issued one.key.pem ip.pem "IP Address:127.0.0.1"'
	check 'a name and an IP address' '
	    acme-step new-order 127.0.0.1 with.test |
	    acme-step respond -t http-01 -w "$www" |
	    acme-step finalize -K one.key.pem -o both.pem &&
	    issued one.key.pem both.pem DNS:with.test "IP Address:127.0.0.1"'

	for type in ec256 ec384 rsa2048 rsa3072; do
		check "a certificate for a key of type $type" '
		    acme-step key -t "$type" -o "$type.key.pem" &&
		    acme-step new-order "$type.test" |
		    acme-step respond -t http-01 -w "$www" |
		    acme-step finalize -K "$type.key.pem" -o "$type.pem" &&
		    issued "$type.key.pem" "$type.pem" "DNS:$type.test"'
	done
	for type in ec384 rsa2048; do
		check "an account with a key of type $type" '
		    ACME_KEY=$type.account.key.pem
		    unset ACME_ACCOUNT
		    acme-step key -t "$type" -o "$ACME_KEY" &&
		    acme-step new-account -y -o "$type.account" &&
		    acme-step new-order -a "$type.account" "by-$type.test" |
		    acme-step respond -t http-01 -w "$www" |
		    acme-step finalize -K one.key.pem -o by.pem &&
		    issued one.key.pem by.pem "DNS:by-$type.test"'
	done
}

group 'issuance, half of the nonces refused'
pebble_start PEBBLE_WFE_NONCEREJECT=50
issuance
pebble_stop

group 'issuance'
pebble_start
issuance

group 'the directory and the account'
check 'directory' '
    acme-step directory >d && cat d &&
    curl -sS --cacert ca.pem "$ACME_DIRECTORY" >d.json &&
    for path in newNonce newAccount newOrder revokeCert keyChange \
	renewalInfo meta.termsOfService; do
	grep -F "$(acme-step json $path d.json)" d || exit
    done
    grep -w shortlived d'
check 'the address family that the CA has' '
    acme-step directory -4 | diff d -'
dies 69 'localhost' 'acme-step directory -6'
check 'trust from SSL_CERT_FILE' '
    unset ACME_CA_FILE
    SSL_CERT_FILE=ca.pem acme-step directory | diff d -'
check 'trust from -C, before ACME_CA_FILE' '
    ACME_CA_FILE=root.pem acme-step directory -C ca.pem | diff d -'
dies 78 'certificate.* root.pem' 'acme-step directory -C root.pem'
check 'new-account finds the one that is there' '
    acme-step new-account -y >again &&
    [ "$(field account again)" = "$(field account account)" ]'
check 'account' '
    acme-step account >shown && cat shown &&
    [ "$(field account shown)" = "$(field account account)" ]'
check 'account, found by its key' '
    unset ACME_ACCOUNT
    acme-step account >shown &&
    [ "$(field account shown)" = "$(field account account)" ]'
check 'new-account needs no account record, it makes one' '
    ACME_ACCOUNT=nowhere acme-step new-account -y >again &&
    [ "$(field account again)" = "$(field account account)" ]'
check 'an account record on standard input' '
    unset ACME_ACCOUNT
    acme-step new-order -a - piped.test <account | grep "^order https://"'
check 'an order of an account that its key finds' '
    unset ACME_ACCOUNT
    acme-step new-order found.test >found && grep "^order https://" found &&
    [ "$(field account found)" = "$(field account account)" ]'
check 'a key that the CA does not know' '
    acme-step key -o unknown.key.pem'
dies 77 'accountDoesNotExist' '
    unset ACME_ACCOUNT; acme-step account -k unknown.key.pem'
dies 77 'accountDoesNotExist' '
    unset ACME_ACCOUNT; acme-step new-order -k unknown.key.pem no.test'
dies 77 'agree' '
    unset ACME_ACCOUNT; acme-step new-account -k unknown.key.pem'
dies 77 'JWS.*; is unknown.key.pem (-k) the key of .*/account (-a)?$' '
    acme-step new-order -k unknown.key.pem no.test'
dies 77 'JWS.*; is unknown.key.pem (-k) the key of the account in the rec' '
    acme-step new-order rec.test >rec; unset ACME_ACCOUNT
    acme-step order -k unknown.key.pem <rec'
dies 77 'DoesNotExist.*; is unkn.* (-k) the key of .*(-a)? If so, run new-acc' '
    acme-step account -k unknown.key.pem'
dies 66 'nowhere.pem: No such file.*; make one with acme-step key -o nowhere' '
    acme-step account -k nowhere.pem'
dies 66 'nowhere: No such file.*; make one with acme-step new-account -o no' '
    acme-step new-order -a nowhere no.test'
dies 65 'is for the CA https.*but -d or ACME_DIRECTORY names .*new-account' '
    acme-step new-order -d "$ACME_DIRECTORY/other" no.test'
for type in '' ec384.account. rsa2048.account.; do
	check "thumbprint of ${type:-ec256.}key" '
	    key=${type:-account.}key.pem
	    [ "$(acme-step thumbprint -k "$key")" = \
		"$(oracle "$key")" ]'
done
check 'get is POST-as-GET' '
    acme-step get "$(field account account)" | acme-step json status |
    grep -x valid'
check 'post signs what it is given' '
    echo "{\"contact\": [\"mailto:new@example.com\"]}" |
    acme-step post "$(field account account)" |
    acme-step json contact.0 | grep -x mailto:new@example.com'
dies 77 'malformed' '
    echo "{\"contact\": 3}" | acme-step post "$(field account account)"'

group 'the record'
check 'new-order' '
    acme-step new-order rec.test 127.0.0.1 >rec && cat rec &&
    not grep -v -e "^[a-z-]* [!-~]" -e "^end$" rec &&
    for word in directory new-nonce nonce account order expires finalize; do
	[ "$(grep -c "^$word [!-~]*$" rec)" = 1 ] || exit
    done
    [ "$(grep -c "^authorization https://" rec)" = 2 ] &&
    grep -x "status pending" rec && grep -x "identifier dns rec.test" rec &&
    grep -x "identifier ip 127.0.0.1" rec'
check 'order brings the record up to date' '
    acme-step order <rec >rec2 &&
    grep -v "^nonce" rec | sort >a && grep -v "^nonce" rec2 | sort |
    diff a -'
check 'lines that we do not know pass through' '
    for step in order "challenges -t http-01" \
	"respond -t http-01 -w $www" order; do
	{ cat rec; echo "note hello world"; } | acme-step $step >noted &&
	[ "$(grep -cx "note hello world" noted)" = 1 ] &&
	grep -x "identifier dns rec.test" noted || exit
    done'
check 'challenges' '
    acme-step new-order ch.test >ch && acme-step challenges <ch >ch2 &&
    cat ch2 && print=$(acme-step thumbprint) &&
    grep "^challenge http-01 dns ch.test https:" ch2 >line &&
    read -r _ _ _ _ _ name content <line &&
    [ "$content" = "$name.$print" ] &&
    grep "^challenge dns-01 dns ch.test https:" ch2 >line &&
    read -r _ _ _ _ url name content <line &&
    token=$(acme-step get "$url" | acme-step json token) &&
    [ "$name" = _acme-challenge.ch.test ] &&
    [ "$content" = "$(printf %s "$token.$print" |
	openssl dgst -sha256 -binary | base64url)" ]'
check 'challenges: tls-alpn-01' '
    grep "^challenge tls-alpn-01 dns ch.test https:" ch2 >line &&
    read -r _ _ _ _ url name content <line && [ "$name" = ch.test ] &&
    token=$(acme-step get "$url" | acme-step json token) &&
    printf %s "$token.$(acme-step thumbprint)" | openssl dgst -sha256 -hex |
    grep "[ =]$content$"'
check 'challenges of one type, added once' '
    acme-step challenges -t http-01 <ch >ch3 &&
    [ "$(grep -c "^challenge" ch3)" = 1 ] &&
    acme-step challenges -t http-01 <ch3 | grep "^challenge" >ch4 &&
    grep "^challenge" ch3 | diff - ch4'
check 'a script that publishes by itself' '
    publish <ch3 && acme-step respond -n -t http-01 <ch3 >ch5 &&
    acme-step order -W <ch5 >ch6 && grep -x "status ready" ch6 &&
    acme-step finalize -K one.key.pem -o ch.pem <ch6 &&
    issued one.key.pem ch.pem DNS:ch.test; got=$?
    rm -f "$www"/*; [ $got = 0 ]'
check 'respond -t without -w, published by itself' '
    acme-step new-order own.test | acme-step challenges -t http-01 >own &&
    publish <own && acme-step respond <own >own2 &&
    grep -x "status ready" own2; got=$?
    rm -f "$www"/*; [ $got = 0 ]'
dies 64 '-n' 'acme-step respond -n -w "$www" <ch'
dies 65 '' 'acme-step order -d "https://127.0.0.1:$pebble/dir" <rec'
dies 65 '' 'acme-step order </dev/null'
dies 65 '' 'echo nonsense | acme-step order'

group 'each step again'
check 'the whole way, each record saved' '
    acme-step new-order -o s1 saved.test &&
    acme-step respond -t http-01 -w "$www" -o s2 <s1 &&
    acme-step finalize -K one.key.pem -o s3.pem <s2 &&
    issued one.key.pem s3.pem DNS:saved.test'
check 'finalize again gives the same chain' '
    acme-step finalize -K one.key.pem -o s4.pem <s2 && cmp s3.pem s4.pem'
check 'so it does from the record of new-order' '
    acme-step finalize -K one.key.pem <s1 | cmp s3.pem -'
check 'and with the request in a file' '
    acme-step csr -K one.key.pem -o s.csr saved.test &&
    acme-step finalize -r s.csr <s2 | cmp s3.pem -'
dies 65 '' 'acme-step finalize -K ec384.key.pem <s2'
check 'respond again lets the order pass' '
    acme-step respond -t http-01 -w "$www" <s1 >s5 &&
    grep -x "status valid" s5 && [ -z "$(ls "$www")" ]'
check 'order shows that it is valid' '
    acme-step order -W <s1 >s6 && grep -x "status valid" s6 &&
    grep "^certificate https://" s6'
check 'certificate' '
    acme-step certificate <s6 | cmp s3.pem - &&
    acme-step certificate <s1 | cmp s3.pem -'
check 'finalize with a request, PEM and DER' '
    for form in PEM DER; do
	openssl req -new -key ec384.key.pem -subj / -outform $form \
	    -addext subjectAltName=DNS:csr.test -out csr &&
	acme-step new-order csr.test |
	acme-step respond -t http-01 -w "$www" |
	acme-step finalize -r csr -o csr.pem &&
	issued ec384.key.pem csr.pem DNS:csr.test || exit
    done'
check 'respond after a crash in the middle' '
    acme-step new-order crash1.test crash2.test >c1 &&
    acme-step challenges -t http-01 <c1 >c2 && publish <c2 &&
    grep -v crash2 c2 | acme-step respond -n >/dev/null &&
    acme-step respond -t http-01 -w "$www" <c2 |
    acme-step finalize -K one.key.pem -o crash.pem &&
    issued one.key.pem crash.pem DNS:crash1.test DNS:crash2.test'
front=$(free_port)
server_start socat -d -d -lf connections \
    "TCP-LISTEN:$front,bind=127.0.0.1,fork,reuseaddr" "TCP:127.0.0.1:$pebble"
up "$front"
check 'one connection for each step' '
    unset ACME_ACCOUNT
    ACME_DIRECTORY=https://127.0.0.1:$front/dir
    : >record
    for code in new-account "new-order a.test b.test" \
	"respond -t http-01 -w $www" "finalize -K one.key.pem"; do
	before=$(grep -c "accepting connection" connections)
	acme-step $code <record >next && mv next record && sleep 0.2 || exit
	after=$(grep -c "accepting connection" connections)
	echo "$code: $before $after"
	[ "$after" = $((before + 1)) ] || exit
    done'

group 'the CA refuses'
dies 77 'blocked.test' 'acme-step new-order blocked.test'
mkdir elsewhere
dies 77 'lost.test.*404' '
    acme-step new-order -o l1 lost.test &&
    acme-step respond -t http-01 -w elsewhere <l1'
check 'what was published is taken down' '[ -z "$(ls elsewhere)" ]'
dies 77 'lost.test.*404' 'acme-step respond -t http-01 -w elsewhere <l1'
dies 77 'lost.test.*404' 'acme-step finalize -K one.key.pem <l1'
check 'order prints an invalid order' '
    acme-step order <l1 | grep -x "status invalid"'
dies 77 'lost.test' 'acme-step order -W <l1'
dies 77 'bad.test' '
    resolver set-servfail "{\"host\": \"bad.test\"}"
    acme-step new-order -o l2 good.test bad.test &&
    acme-step respond -t http-01 -w "$www" <l2'
for shell in dash 'busybox ash' bash; do
	dies 77 '404' "rm -f lost.pem
	    $shell -c 'acme-step new-order lost.test |
		acme-step respond -t http-01 -w elsewhere |
		acme-step finalize -K one.key.pem -o lost.pem'"
	check "a pipeline's status in $shell" '
	    [ ! -e lost.pem ] && [ -z "$(ls elsewhere)" ] &&
	    $shell -c "
		acme-step new-order blocked.test 2>err |
		acme-step respond -t http-01 -w elsewhere |
		acme-step finalize -K one.key.pem -o lost.pem"
	    [ $? = 77 ] && [ ! -e lost.pem ]'
done
check 'what stands on the pipe' '
    acme-step new-order blocked.test 2>err | cat >piped
    cat piped err; tail -n 1 piped >failed
    sed "\$d" piped | cut -d" " -f1 | tr "\n" " " >early
    is "directory new-nonce account " "cat early" &&
    sed "s/^acme-step: \([a-z-]*\): /failed 77 \1 /" err | diff - failed &&
    for step in order challenges "respond -t http-01 -w elsewhere"; do
	acme-step $step <piped 2>err | diff failed - && [ ! -s err ] || exit
    done'
check 'a step that is told of a failure does nothing' '
    acme-step finalize -K one.key.pem <piped >out 2>err
    [ $? = 77 ] && [ ! -s out ] && [ ! -s err ] &&
    acme-step order <piped >out 2>err
    [ $? = 77 ] && [ ! -s out ] && [ ! -s err ]'
dies 75 'pending.test' '
    acme-step new-order pending.test |
    acme-step finalize -T 3 -K one.key.pem'
dies 75 '' 'acme-step new-order stuck.test |
    acme-step order -W -T 2'
dies 77 '' 'acme-step certificate <l1'

group 'revocation'
check 'a certificate that is good' 'status_of one.pem | grep "\"Valid\""'
check 'revoke-cert' '
    acme-step revoke-cert one.pem && status_of one.pem >status &&
    cat status && [ "$(acme-step json Status status)" = Revoked ]'
check 'what is revoked already is as it was asked for' '
    acme-step revoke-cert one.pem 2>err &&
    cat err && grep "is already revoked" err'
check 'a reason by its name' '
    acme-step revoke-cert -c superseded three.pem &&
    status_of three.pem >status && cat status &&
    [ "$(acme-step json Reason status)" = 4 ]'
check 'a reason by its number' '
    acme-step revoke-cert -c 5 wild.pem && status_of wild.pem >status &&
    cat status && [ "$(acme-step json Reason status)" = 5 ]'
dies 64 'reason' 'acme-step revoke-cert -c boredom ip.pem'
dies 66 'nowhere.pem' 'acme-step revoke-cert nowhere.pem'
dies 65 '' 'acme-step revoke-cert one.key.pem'

group 'signals'
# published COUNT: so many files are in the web server's directory.
published() {
	set -- "$1" "$www"/*
	[ -e "$2" ] || set -- "$1"
	[ $(($# - 1)) = "$1" ]
}
for signal in HUP:129 INT:130 QUIT:131 TERM:143 XCPU:152 XFSZ:153; do
	check "SIG${signal%:*} takes down what was published" '
	    acme-step new-order slow.test slower.test >slow || exit
	    start=$(date +%s)
	    env --default-signal acme-step respond -t http-01 -w "$www" \
		-s 30 <slow & pid=$!
	    await published 2 && kill -"${signal%:*}" $pid
	    wait $pid; got=$?
	    echo "status $got"
	    [ $got = "${signal#*:}" ] && published 0 &&
	    [ $(($(date +%s) - start)) -lt 15 ]'
done
check 'after SIGKILL the same command goes on, and cleans up' '
    acme-step new-order -o killed killed.test || exit
    acme-step respond -w "$www" -s 40 <killed & pid=$!
    await published 1; kill -KILL $pid; wait $pid
    published 1 && acme-step respond -w "$www" <killed >out &&
    grep -x "status ready" out && published 0'
check 'also if the order has become ready meanwhile' '
    acme-step new-order -o killed killed2.test &&
    acme-step challenges -t http-01 <killed >told || exit
    acme-step respond -w "$www" -s 40 <killed & pid=$!
    await published 1; kill -KILL $pid; wait $pid
    published 1 && acme-step respond -n <told >out &&
    acme-step order -W <killed >ready && published 1 &&
    acme-step respond -w "$www" <killed >out &&
    grep -x "status ready" out && published 0 &&
    acme-step finalize -K one.key.pem -o killed.pem <out &&
    issued one.key.pem killed.pem DNS:killed2.test'
check 'the web server may read what we publish' '
    umask 077
    acme-step respond -t http-01 -w "$www" -s 30 <slow & pid=$!
    await published 2; stat -c %a "$www"/* >modes
    kill $pid; wait $pid
    cat modes; [ "$(sort -u modes)" = 644 ]'
check 'the order can still be used' '
    acme-step respond -t http-01 -w "$www" -s 1 <slow |
    acme-step finalize -K one.key.pem -o slow.pem &&
    issued one.key.pem slow.pem DNS:slow.test DNS:slower.test'

case $acme in
*-san|*-cov)	;;
*)	group 'keys in memory, before Pebble'
	# whole STATUS COMMAND...: with the record mem.in; its output is next.
	whole() {
		status=$1
		shift
		clean_end "$both" "$status" acme-step "$@" <mem.in >next &&
		cp next "mem.$1"
	}
	# pipe STATUS COMMAND...: so that its output is the next one's input.
	pipe() { whole "$@" && cp next mem.in; }
	cp hostile/residue hostile/private.sh .
	mkdir mem.dir
	for type in ec256 ec384 rsa2048; do
		export ACME_KEY="mem.$type" ACME_ACCOUNT="mem.$type.account"
		both="mem.$type leaf.$type"
		acme-step key -t $type -o mem.$type
		acme-step key -t $type -o leaf.$type
		check "$type: new-account, account, get, post" '
		    : >mem.in && whole 0 new-account -y &&
		    cp next "$ACME_ACCOUNT" && whole 0 account &&
		    whole 0 get "$(field account "$ACME_ACCOUNT")" &&
		    echo "{\"contact\": []}" >mem.in &&
		    whole 0 post "$(field account "$ACME_ACCOUNT")"'
		check "$type: new-order, respond, finalize, revoke-cert" '
		    pipe 0 new-order mem.test && pipe 0 respond \
			-t tls-alpn-01 -l "127.0.0.1:$tls" &&
		    whole 0 finalize -K leaf.$type &&
		    whole 1 due -K leaf.$type mem.finalize &&
		    whole 0 revoke-cert -K leaf.$type mem.finalize'
		check "$type: an order that fails, with -w and -P" '
		    pipe 0 new-order 192.0.2.1 && whole 77 respond \
			-t http-01 -w mem.dir -T 20 -P "socat - TCP:%h:%p"'
		check "$type: key-change" 'whole 0 key-change -K leaf.$type'
	done
	ACME_KEY=$tmp/account.key.pem ACME_ACCOUNT=$tmp/account
	;;
esac

group 'files'
check 'a key is private and never replaced' '
    (umask 0; acme-step key -o new.key.pem) &&
    [ "$(stat -c %a new.key.pem)" = 600 ]'
dies 73 'new.key.pem' 'acme-step key -o new.key.pem'
dies 73 'elsewhere/no/key.pem' 'acme-step key -o elsewhere/no/key.pem'
dies 64 '-o' 'acme-step key'
dies 66 'nowhere.pem' 'acme-step thumbprint -k nowhere.pem'
dies 66 'nowhere' 'acme-step new-order -a nowhere no.test'
check 'rsa4096' '
    acme-step key -t rsa4096 -o rsa4096.key.pem &&
    openssl pkey -in rsa4096.key.pem -check -noout -text | grep "4096 bit"'
dies 64 'rsa1024' 'acme-step key -t rsa1024 -o rsa1024.key.pem'

check '-o /dev/stdout is standard output, not the file behind it' '
    { echo before; acme-step order -o /dev/stdout <s1; echo after; } >>std &&
    head -n 1 std | grep -x before && tail -n 1 std | grep -x after &&
    grep -x "status valid" std'
dies 73 'link does not lead to a file' 'ln -s nowhere dangling
    acme-step order -o dangling <s1'
dies 73 'a reader to open fifo' 'mkfifo fifo; acme-step order -T 2 -o fifo <s1'
check 'a write that fails tells the pipe' '
    acme-step order -o /dev/full <s1 2>err | cat >piped; cat piped
    grep "^failed 74 order " piped'
for step in challenges 'respond -t http-01' deactivate-authz; do
	dies 65 "no 'order' line" "acme-step $step <account"
done
mkdir empty
dies 66 'empty is not a box' 'acme-step send empty'
dies 73 'nosuch.invalid:8080' '
    acme-step respond -t http-01 -l nosuch.invalid:8080 <slow'
check 'a failure leaves the old output' '
    echo old >kept
    acme-step order -o kept </dev/null 2>err
    [ $? = 65 ] && [ "$(cat kept)" = old ] &&
    ls -A | not grep "kept."'
check 'success replaces it' '
    acme-step order -o kept <s1 && grep -x "status valid" kept &&
    ls -A | not grep "kept."'
dies 73 'nowhere' '
    acme-step respond -t http-01 -w nowhere <slow'

# Permissions are not for root.
mkdir locked && cp "$acme" locked/acme-step && chmod 555 locked &&
    chmod 755 "$tmp"
unprivileged() {
	if [ "$(id -u)" = 0 ]; then
		setpriv --reuid=65534 --regid=65534 --clear-groups "$@"
	else
		"$@"
	fi
}
dies 73 'locked/out' 'unprivileged locked/acme-step directory -o locked/out'
check 'nothing is asked before the output is open' '
    acme-step new-order -v -o nowhere/out no.test 2>err
    [ $? = 73 ] && not grep -i http err'

# full CODE...: run it where the directory full is a full file system.
mkdir full
full() {
	own=-rm
	[ "$(id -u)" != 0 ] || own=-m
	unshare $own sh -c "mount -t tmpfs -o size=16k none full || exit
	    dd if=/dev/zero of=full/x bs=4k 2>/dev/null
	    $*"
}
dies 74 'space' 'full "acme-step certificate -o full/chain.pem <s1"'
check 'nothing of it is left' '
    full "acme-step certificate -o full/chain.pem <s1 2>err; ls -A full" >ls
    echo x | diff - ls'
dies 74 'space' 'acme-step certificate <s1 >/dev/full'
dies 74 'f.pem' '
    trap "" XFSZ; ulimit -f 1; acme-step certificate -o f.pem <s1'
check 'nor of this' 'ls -A | not grep f.pem'
check 'a limit of size ends the step as other signals do: 153' '
    { (ulimit -f 1; exec acme-step certificate -o f.pem <s1)
	echo "status $?"; } 2>&1 | cat >all
    cat all; grep -x "status 153" all &&
    grep "^acme-step: certificate: ended by signal 25" all &&
    ls -A | not grep -e f.pem -e "[.]acme-step"'

case $acme in
*-san|*-cov)	# needs its libraries
	;;
*)	group 'FROM scratch'
	check 'the program is a static PIE' 'static_pie "$acme"'
	check 'of less than 300,000 bytes' '
	    size=$(wc -c <"$acme"); echo "$size"; [ "$size" -lt 300000 ]'
	# mapped FILE: where the program is in memory, as its command sees it.
	mapped() {
		acme-step directory -P "cp /proc/\$PPID/maps all" 2>err
		grep -F "$(readlink -f "$acme")" all >"$1" && cat "$1"
	}
	# mode_at ADDRESS MAP: what may be done there.
	mode_at() {
		while read -r range mode _; do
			[ $((0x${range%-*})) -gt "$1" ] ||
			    [ $((0x${range#*-})) -le "$1" ] || echo "$mode"
		done <"$2"
	}
	check 'what was relocated is read-only while it runs' '
	    mapped map && base=$((0x$(cut -d - -f 1 map | head -n 1))) &&
	    set -- $(readelf -lW "$acme" | grep GNU_RELRO) &&
	    first=$((base + $3)) last=$((base + $3 + $6 - 1)) &&
	    [ "$(mode_at $first map) $(mode_at $last map)" = "r--p r--p" ]'
	check 'two runs have different addresses' '
	    mapped map1 && mapped map2 &&
	    not cmp map1 map2'
	mkdir scratch && cp "$acme" scratch/acme-step && cp ca.pem scratch
	in_scratch() {
		if [ "$(id -u)" = 0 ]; then
			chroot scratch /acme-step "$@"
		else
			unshare -r chroot scratch /acme-step "$@"
		fi
	}
	check 'the only file of a container' '
	    ACME_DIRECTORY=https://127.0.0.1:$pebble/dir
	    ACME_CA_FILE=/ca.pem ACME_KEY=/account.pem
	    unset ACME_ACCOUNT
	    in_scratch key -o /account.pem &&
	    in_scratch key -o /key.pem &&
	    in_scratch new-account -y -o /account &&
	    in_scratch new-order -a /account scratch.test |
	    in_scratch challenges -t http-01 >scratch.order &&
	    publish <scratch.order &&
	    in_scratch respond <scratch.order |
	    in_scratch finalize -K /key.pem -o /chain.pem &&
	    issued scratch/key.pem scratch/chain.pem DNS:scratch.test; got=$?
	    rm -f "$www"/*; [ $got = 0 ]'
	;;
esac

group 'external account binding'
pebble_stop
eab=true
pebble_start PEBBLE_WFE_ORDERS_PER_PAGE=3
eab=false
unset ACME_ACCOUNT
ACME_KEY=$tmp/eab.key.pem
export ACME_KEY
acme-step key -o "$ACME_KEY"
check 'directory says that it is required' '
    acme-step directory | grep -x "external-account-required yes"'
dies 77 'externalAccountRequired.*new-account -e' 'acme-step new-account -y'
printf '%s\n' "kid-1 $mac_key" >eab && chmod 600 eab
check 'from a file' '
    acme-step new-account -y -e eab >eab.account 2>err && [ ! -s err ] &&
    grep "^account https://" eab.account'
check 'from a file with a byte order mark, of another system' '
    (umask 077; printf "\357\273\277kid-1\r\n%s\r\n" "$mac_key" >marked)
    acme-step key -o eab5.key.pem &&
    acme-step new-account -k eab5.key.pem -y -e marked >eab5.account &&
    grep "^account https://" eab5.account'
check 'the account is found without it, too, or the CA says what it wants' '
    acme-step account | grep -Fx "$(grep "^account" eab.account)"'
check 'from the environment, padded, in the other alphabet' '
    acme-step key -o eab2.key.pem &&
    ACME_EAB_KID=kid-2 ACME_EAB_HMAC_KEY=$(echo "$mac_key" | tr -- -_ +/)== \
	acme-step new-account -k eab2.key.pem -y | grep "^account https://"'
check 'from secrets that end with a newline' '
    acme-step key -o eab4.key.pem && end="
" && ACME_EAB_KID="kid-2$end" ACME_EAB_HMAC_KEY="$mac_key$end" \
	acme-step new-account -k eab4.key.pem -y | grep "^account https://"'
acme-step key -o eab3.key.pem
dies 77 'unauthorized' '
    printf "kid-1 AAAA%s\n" "$mac_key" >wrong; chmod 600 wrong
    acme-step new-account -k eab3.key.pem -y -e wrong'
dies 77 'unauthorized.*; the HMAC key was base64 of text' '
    printf "kid-1 %s\n" "$(printf %s "$mac_key" | base64url)" >wrong
    chmod 600 wrong
    acme-step new-account -k eab3.key.pem -y -e wrong'
check 'that is not said of another key' '
    printf "kid-1 AAAA%s\n" "$mac_key" >wrong; chmod 600 wrong
    acme-step new-account -k eab3.key.pem -y -e wrong 2>err
    [ $? = 77 ] && ! grep "HMAC key was" err'
dies 77 'not known' '
    printf "kid-9 %s\n" "$mac_key" >wrong
    acme-step new-account -k eab3.key.pem -y -e wrong'
for text in '' kid-1 'kid-1 a b' 'kid-1 !!' 'kid-1 ='; do
	dies 65 '' "echo '$text' >wrong
	    acme-step new-account -k eab3.key.pem -y -e wrong"
done
dies 66 nowhere 'acme-step new-account -k eab3.key.pem -y -e nowhere'
dies 65 ACME_EAB_KID 'ACME_EAB_HMAC_KEY=aaaa \
    acme-step new-account -k eab3.key.pem -y'
check 'a file that others may read: a warning' '
    chmod 644 eab; acme-step new-account -y -e eab 2>err >/dev/null &&
    grep "accessible to other users" err; got=$?; chmod 600 eab; [ $got = 0 ]'
ACME_ACCOUNT=$tmp/eab.account
export ACME_ACCOUNT

group 'accounts'
check 'contacts are updated' '
    acme-step account -m mailto:a@example.com -m mailto:b@example.com >shown &&
    grep -x "contact mailto:a@example.com" shown &&
    grep -x "contact mailto:b@example.com" shown &&
    acme-step get "$(field account shown)" | acme-step json contact >got &&
    printf "mailto:a@example.com\nmailto:b@example.com\n" | diff - got'
check 'and taken away' '
    acme-step account -m "" >shown && not grep "^contact" shown'
dies 64 'mailto' 'acme-step account -m a@example.com'
check 'orders are listed, over several pages' '
    for i in 1 2 3 4 5 6 7; do
	acme-step new-order "list-$i.test" | sed -n "s/^order //p"
    done | sort >made && [ "$(grep -c . made)" = 7 ] &&
    acme-step account >shown && cat shown &&
    sed -n "s/^account-order //p" shown | sort | diff made -'
check 'the list of orders comes before the end of the record' '
    is end "tail -n 1 shown" && is 1 "grep -cx end shown"'
check 'such a record can be used as an account record' '
    acme-step new-order -a shown shown.test | grep "^order https://"'
# evil JSON: another CA, the canned one, has this directory.
evil() {
	(cd hostile && fresh && answer GET_dir '200 OK' "$1")
	cat ca.pem hostile/root.pem >both.pem
}
for directory in "$(curl -sS --cacert ca.pem "$ACME_DIRECTORY")" \
    "$(curl -sS --cacert ca.pem "$ACME_DIRECTORY" |
    sed "s|\"newNonce\": \"[^\"]*|\"newNonce\":\"$ca/newNonce|")"; do
	dies 76 "$ca.*https://localhost:$pebble" '
	    evil "$directory"
	    unset ACME_ACCOUNT
	    acme-step account -D -C both.pem -d "$ca/dir"'
done
dies 76 "redirects to another origin, https://localhost:$pebble" '
    evil {}; unset ACME_ACCOUNT
    (cd hostile && raw GET_dir "HTTP/1.1 302 X\r\nLocation: \
$ACME_DIRECTORY\r\nContent-Length: 0\r\n\r\n")
    acme-step account -D -C both.pem -d "$ca/dir"'
check 'no other CA has ended the account' '
    acme-step account | grep -x "account-status valid"'

group 'key rollover'
acme-step key -t ec384 -o new.account.key
check 'key-change' '
    acme-step key-change -K new.account.key >changed 2>err; got=$?
    cat changed err; [ $got = 0 ] && [ "$(grep -c "" err)" = 1 ] &&
    grep "now new.account.key, no longer .*eab.key.pem" err &&
    [ "$(field account changed)" = "$(field account eab.account)" ]'
check 'the new key orders' '
    acme-step new-order -k new.account.key rolled.test |
    grep "^order https://"'
dies 77 '' 'acme-step new-order rolled.test'
check 'again: it says how things are' '
    acme-step key-change -K new.account.key 2>err >again; got=$?
    cat again err; [ $got = 0 ] && grep "now new.account.key" err &&
    unset ACME_ACCOUNT &&
    acme-step key-change -K new.account.key 2>err >again &&
    grep "now new.account.key" err &&
    [ "$(field account again)" = "$(field account eab.account)" ]'
check 'without the account'\''s record, and back' '
    unset ACME_ACCOUNT && acme-step key -o third.key &&
    acme-step key-change -k new.account.key -K third.key &&
    acme-step key-change -k third.key -K new.account.key >again 2>err
    got=$?; cat again err; [ $got = 0 ] && grep "now new.account.key" err &&
    [ "$(field account again)" = "$(field account eab.account)" ]'
dies 7[67] 'still new.account.key' '
    acme-step key-change -k new.account.key -K eab2.key.pem'
dies 65 'same key' '
    acme-step key-change -k new.account.key -K new.account.key'
dies 66 'nowhere' 'acme-step key-change -K nowhere'
dies 64 '; use -K FILE' 'acme-step key-change -K - <new.account.key'
ACME_KEY=$tmp/new.account.key

group 'authorizations'
check 'deactivate-authz' '
    acme-step new-order -o da give-1.test give-2.test &&
    acme-step deactivate-authz <da >da2 && cat da2 &&
    not grep "^authorization" da2 && grep "^order" da2 &&
    for url in $(sed -n "s/^authorization //p" da); do
	[ "$(acme-step get "$url" | acme-step json status)" = deactivated ] ||
	    exit
    done'
check 'again, it does nothing' '
    acme-step deactivate-authz -v <da 2>err >da2 &&
    [ "$(grep -c "authZ" err)" -gt 0 ] && cat err'

group 'DNS challenges'
check 'a wildcard by dns-account-01' '
    acme-step new-order "*.acc.test" acc.test |
    acme-step challenges -t dns-account-01 >acc && cat acc &&
    label=$(printf %s "$(field account acc)" | openssl dgst -sha256 -binary |
	head -c 10 | base32 | tr A-Z a-z) &&
    [ "$(grep -c "^challenge dns-account-01 dns .* \
_$label._acme-challenge.acc.test " acc)" = 2 ] && publish <acc &&
    acme-step respond <acc |
    acme-step finalize -K one.key.pem -o acc.pem &&
    issued one.key.pem acc.pem "DNS:*.acc.test" DNS:acc.test'
check 'a wildcard by dns-persist-01' '
    acme-step new-order "*.persist.test" persist.test |
    acme-step challenges -t dns-persist-01 >per && cat per &&
    grep "^challenge dns-persist-01 dns \*.persist.test https:[^ ]* \
_validation-persist.persist.test [^ ]*; accounturi=$(field account per); \
policy=wildcard$" per && publish <per &&
    acme-step respond <per |
    acme-step finalize -K one.key.pem -o per.pem &&
    issued one.key.pem per.pem "DNS:*.persist.test" DNS:persist.test'
check 'IPv6 addresses in an order' '
    acme-step new-order 2001:DB8::1 >v6 &&
    grep -x "identifier ip 2001:db8::1" v6 &&
    acme-step challenges <v6 >v6c && cat v6c &&
    grep "^challenge tls-alpn-01 ip 2001:db8::1 https:[^ ]* 1\.0\.0\.0\.0\.\
.*8\.b\.d\.0\.1\.0\.0\.2\.ip6\.arpa [0-9a-f]*$" v6c &&
    not grep "^challenge dns" v6c'

group 'profiles and times'
check 'directory lists the profiles' '
    acme-step directory | grep "^profile shortlived six days"'
check 'an order with a profile' '
    acme-step new-order -p shortlived short.test >short &&
    grep -x "profile shortlived" short &&
    acme-step respond -t http-01 -w "$www" <short |
    acme-step finalize -K one.key.pem -o short.pem &&
    issued one.key.pem short.pem DNS:short.test &&
    openssl x509 -in short.pem -noout -checkend $((5 * 86400)) &&
    not openssl x509 -in short.pem -noout -checkend $((7 * 86400))'
dies 77 'no profile .exotic., only: .*shortlived' '
    acme-step new-order -p exotic exotic.test'
for option in -b -u; do
	for value in x 2026-11-24 2026-11-24T12:00:00 2026-13-24T12:00:00Z \
	    2026-11-24T12:00Z 2026-11-24T12:00:00.Z 2026-11-24T12:00:00+1:00
	do
		dies 64 "$option needs a time" \
		    "acme-step new-order $option '$value' times.test"
	done
done
check 'notBefore and notAfter' '
    now=$(date -u +%FT%TZ) then=$(date -u -d "20 days" +%FT%TZ) &&
    acme-step new-order -b "$now" -u "$then" times.test >times &&
    acme-step get "$(field order times)" >times.json && cat times.json &&
    [ "$(acme-step json notBefore times.json)" = "$now" ] &&
    [ "$(acme-step json notAfter times.json)" = "$then" ]'

group 'renewal information'
# Pebble knows a certificate to be replaced by its serial number without the
# zero byte that DER puts before a first bit of 1 (one number of 256).
check 'issue one' '
    until
	acme-step new-order ari.test |
	acme-step respond -t http-01 -w "$www" |
	acme-step finalize -K one.key.pem -o ari.pem || exit
	openssl x509 -in ari.pem -noout -serial | grep "=[0-7]"
    do :; done'
check 'a fresh one: not yet' '
    acme-step renewal-info ari.pem >ari; got=$?; cat ari
    [ $got = 1 ] && grep -E "^window [0-9T:-]+Z [0-9T:-]+Z$" ari &&
    grep -E "^moment [0-9T:-]+Z$" ari && grep -E "^retry-after [0-9]+$" ari'
check 'the moment is in the window, and always the same' '
    read -r _ start end <ari && moment=$(field moment ari) &&
    [ "$(printf "%s\n" "$start" "$moment" "$end" | sort | sed -n 2p)" = \
	"$moment" ] && acme-step renewal-info ari.pem | diff ari - '
# window START END [MORE]: what the CA says of ari.pem from now on.
window() {
	jq=$(awk '{ printf "%s\\n", $0 }' ari.pem)
	more=$(printf %s "${3-}" | sed 's/"/\\"/g')
	curl -sS --fail --cacert ca.pem -d "{\"certificate\": \"$jq\",
	    \"ariResponse\": \"{\\\"suggestedWindow\\\":{\\\"start\\\":\
\\\"$1\\\",\\\"end\\\":\\\"$2\\\"}$more}\"}" \
	    "https://127.0.0.1:$management/set-renewal-info/"
}
check 'a window in the past: due' '
    window 2026-01-01T00:00:00Z 2026-01-02T00:00:00Z \
	",\"explanationURL\":\"https://example.com/why\"" &&
    acme-step renewal-info ari.pem >ari; got=$?; cat ari; [ $got = 0 ] &&
    grep -x "explanation https://example.com/why" ari &&
    grep -x "window 2026-01-01T00:00:00Z 2026-01-02T00:00:00Z" ari'
check 'fractions of a second, and offsets' '
    window 2026-01-01T01:30:00.25+01:30 2026-01-01T19:00:00.999999-05:00 &&
    acme-step renewal-info ari.pem >ari; got=$?; cat ari; [ $got = 0 ] &&
    grep -x "window 2026-01-01T00:00:00Z 2026-01-02T00:00:00Z" ari'
check 'it is another moment for another window' '
    for d in 01 02 03 04; do
	window 2026-01-${d}T00:00:00Z 2027-09-01T00:00:00Z &&
	acme-step renewal-info ari.pem
    done | sed -n "s/^moment //p" | sort -u >moments
    cat moments; [ "$(grep -c . moments)" = 4 ]'
for window in '2026-01-02T00:00:00Z 2026-01-02T00:00:00Z' \
    '2026-01-02T00:00:00Z 2026-01-01T00:00:00Z'; do
	dies 76 'empty suggestedWindow' "window $window
	    acme-step renewal-info ari.pem"
done
for window in 'x 2026-01-01T00:00:00Z' '2026-01-02T00:00:00Z 2026'; do
	dies 76 'ggestedWindow' "window $window; acme-step renewal-info ari.pem"
done
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
    -keyout keyless.key -out keyless.pem -subj / -addext \
    authorityKeyIdentifier=none -addext subjectKeyIdentifier=none 2>/dev/null
dies 65 'authority key identifier' 'acme-step renewal-info keyless.pem'
dies 77 '' 'acme-step renewal-info ca.pem'
dies 66 nowhere 'acme-step renewal-info nowhere'
dies 65 one.key.pem 'acme-step renewal-info one.key.pem'
check 'an order that replaces a certificate' '
    acme-step new-order -R ari.pem ari.test >rep && grep "^replaces " rep &&
    acme-step respond -t http-01 -w "$www" <rep |
    acme-step finalize -K one.key.pem -o ari2.pem &&
    issued one.key.pem ari2.pem DNS:ari.test'
check 'once more: refused, and ordered without' '
    acme-step new-order -v -R ari.pem ari.test >rep 2>err; got=$?
    cat rep err; [ $got = 0 ] && not grep "^replaces " rep &&
    grep "^order https://" rep && grep "without replaces.*lreadyReplaced" err'
check 'a certificate without a key identifier replaces nothing' '
    acme-step new-order -v -R keyless.pem ari.test >rep 2>err && cat err &&
    not grep "^replaces " rep && grep "keyless.pem.*replaces nothing" err'
dies 66 nowhere 'acme-step new-order -R nowhere ari.test'

group 'revocation with the certificate'\''s own key'
dies 65 'not the key' '
    unset ACME_ACCOUNT ACME_KEY
    acme-step revoke-cert -K new.account.key ari2.pem'
check 'no account is needed' '
    unset ACME_ACCOUNT; ACME_KEY=nowhere
    acme-step revoke-cert -K one.key.pem -c keyCompromise ari2.pem &&
    status_of ari2.pem >status && cat status &&
    [ "$(acme-step json Status status)" = Revoked ] &&
    [ "$(acme-step json Reason status)" = 1 ]'
check 'what is revoked already is as it was asked for' '
    acme-step revoke-cert -K one.key.pem ari2.pem 2>err &&
    cat err && grep "is already revoked" err'

group 'an account that is given up'
check 'account -D' '
    acme-step account -D >gone && grep -x "account-status deactivated" gone'
dies 77 '' 'acme-step new-order gone.test'
dies 77 '' 'acme-step account'

group 'alternate chains'
pebble_stop
pebble_start PEBBLE_ALTERNATE_ROOTS=2 PEBBLE_CHAIN_LENGTH=2
unset ACME_ACCOUNT
for i in 0 1 2; do
	control "roots/$i" >"root$i.pem"
done
top() { openssl x509 -in "$1" -noout -subject -nameopt multiline |
    sed -n 's/^ *commonName *= //p'; }
check 'the first chain, without -i' '
    acme-step new-account -y >account && ACME_ACCOUNT=$tmp/account &&
    acme-step new-order chain.test |
    acme-step respond -t http-01 -w "$www" >chain.order &&
    acme-step finalize -K one.key.pem -o chain0.pem <chain.order &&
    openssl verify -CAfile root0.pem -untrusted chain0.pem chain0.pem &&
    [ "$(grep -c BEGIN chain0.pem)" = 3 ]'
check 'each root by its name' '
    for i in 0 1 2; do
	acme-step finalize -K one.key.pem -i "$(top root$i.pem)" \
	    -o chain.pem <chain.order &&
	openssl verify -CAfile root$i.pem -untrusted chain.pem chain.pem &&
	acme-step certificate -i "$(top root$i.pem)" <chain.order |
	diff - chain.pem || exit
    done'
dies 77 "issuer .No Such Root., only: $(top root0.pem), .*$(top root2.pem)" '
    acme-step finalize -K one.key.pem -i "No Such Root" <chain.order'
check 'and the certificate is not lost' '
    acme-step finalize -K one.key.pem <chain.order | diff - chain0.pem'
ACME_KEY=$tmp/account.key.pem
unset ACME_ACCOUNT

group 'responders, before Pebble'
# They stand where Pebble looks; the web server is elsewhere.
pebble_stop
web_server=$web dns_server=$dns
web=$(free_port) tls=$(free_port)
pebble_start
unset ACME_ACCOUNT
check 'an account' 'acme-step new-account -y >account'
ACME_ACCOUNT=$tmp/account
export ACME_ACCOUNT
v6=
! has_v6 || v6=::1
check 'http-01, names and addresses' '
    acme-step new-order l.test 127.0.0.1 $v6 $(seq -f n%g.l.test 20) |
    acme-step respond -t http-01 -l "$web" |
    acme-step finalize -K one.key.pem -o l.pem &&
    openssl x509 -in l.pem -noout -ext subjectAltName &&
    [ "$(names_in l.pem | grep -c .)" = $((22 ${v6:++ 1})) ]'
check 'tls-alpn-01, names and addresses' '
    acme-step new-order l.test 127.0.0.1 $v6 $(seq -f n%g.l.test 20) |
    acme-step challenges -t tls-alpn-01 |
    acme-step respond -l "$tls" |
    acme-step finalize -K one.key.pem -o l.pem &&
    [ "$(names_in l.pem | grep -c .)" = $((22 ${v6:++ 1})) ]'
check 'the example with which help ends, on another port' '
    mkdir example && cd example && unset ACME_KEY ACME_ACCOUNT &&
    acme-step help | sed -n "/^  acme-step key -o account/,\$s/^  //p" |
    sed "s/-l 80 /-l $web /" >script && cat script && cp ../root.pem . &&
    [ "$(grep -c . script)" = 6 ] && sh -e script &&
    issued example.pem fullchain.pem DNS:example.com'
check 'nobody listens any more' '
    ! listening "$web" && ! listening "$tls"'
check 'nor when the CA refuses, whose message says why' '
    acme-step new-order other.test | acme-step challenges -t http-01 |
    sed "/^challenge/s/[^ ]*\$/wrong/" |
    acme-step respond -l "$web" 2>err; got=$?
    cat err; [ $got = 77 ] && ! listening "$web"'
check 'nor when time runs out, or somebody kills the step' '
    acme-step new-order slow.l.test | acme-step challenges -t http-01 >slow
    kill -STOP $pebble_pids
    acme-step respond -l 127.0.0.1:$tls -T 3 <slow 2>err; got=$?
    kill -CONT $pebble_pids
    cat err; [ $got = 69 ] && ! listening "$tls" &&
    { acme-step respond -l 127.0.0.1:$tls -s 40 <slow & pid=$!
    await listening "$tls"; sleep 0.5; kill -KILL $pid
    await eval "! listening $tls"; }'
pebble_stop
dns=$(free_port)
pebble_start
unset ACME_ACCOUNT
check 'an account' 'acme-step new-account -y >account'
export ACME_ACCOUNT=$tmp/account
for type in dns-01 dns-account-01 dns-persist-01; do
	check "$type, and Pebble asks us alone" '
	    acme-step new-order "*.d.test" d.test e.test x.d.test |
	    acme-step respond -t "$type" -l "127.0.0.1:$dns" |
	    acme-step finalize -K one.key.pem -o d.pem &&
	    issued one.key.pem d.pem "DNS:*.d.test" DNS:d.test DNS:e.test \
		DNS:x.d.test'
done
pebble_stop

group 'looks: a network with web servers and name servers'
# It has an own address for each server, so that they can stand at the ports
# where a CA looks.  A resolver knows where "test" is, and that there is nothing
# else; par serves that, and other.test; n1 and n2 serve example.test; liar
# answers for liar.test what nobody should.  Pebble is there, too.
lookout=$tmp/look
mkdir "$lookout" "$lookout/www" "$lookout/wrong" "$lookout/scratch"
chmod 755 "$tmp" "$lookout"/*
cat >"$lookout/test.zone" <<'END'
$TTL 1
@	SOA	a.test. b.test. 1 2 3 4 1
@	NS	a.test.
a	A	10.9.0.1
ns1	A	10.9.0.2
ns1	AAAA	fd00:9::2
ns2	A	10.9.0.3
example	NS	ns1.test.
example	NS	ns2.test.
signed	NS	ns2.test.
liar	NS	ns.liar.test.
ns.liar	A	10.9.0.4
END
cat >"$lookout/example.zone" <<'END'
@	NS	ns1.test.
@	NS	ns2.test.
web	A	10.9.0.5
lost	A	10.9.0.5
away	A	10.9.0.6
www	A	10.9.0.7
six	A	10.9.0.5
six	AAAA	fd00:9::6
far	A	10.9.0.5
far	AAAA	2001:db8::1
farther	AAAA	2001:db8::1
closed	A	10.9.0.5
closed	A	10.9.0.1
odd	A	10.9.0.8
_acme-challenge.alias		CNAME	elsewhere.other.test.
_acme-challenge.far.alias	CNAME	_acme-challenge.alias
_acme-challenge.given		NS	ns.given
ns.given			A	10.9.0.6
_acme-challenge.below		NS	ns._acme-challenge.below
ns._acme-challenge.below	A	10.9.0.6
_acme-challenge.lame		NS	a.test.
_acme-challenge.shut		NS	shut
shut				A	10.9.0.5
_acme-challenge.nowhere		NS	nowhere.test.
_acme-challenge.half		NS	half.liar.test.
_acme-challenge.circle		CNAME	_acme-challenge.circle2
_acme-challenge.circle2		CNAME	_acme-challenge.circle
END
cat >"$lookout/nginx.conf" <<END
daemon off;
pid $lookout/nginx.pid;
error_log $lookout/nginx.log;
events { }
http {
	access_log off;
	client_body_temp_path $lookout/scratch;
	proxy_temp_path $lookout/scratch;
	fastcgi_temp_path $lookout/scratch;
	uwsgi_temp_path $lookout/scratch;
	scgi_temp_path $lookout/scratch;
	server {
		listen 10.9.0.5:80;
		server_name web.example.test;
		location /.well-known/acme-challenge/ { alias $lookout/www/; }
	}
	server {
		listen 10.9.0.5:80;
		server_name lost.example.test;
		root $lookout/wrong;
	}
	server {
		listen 10.9.0.6:80;
		return 301 https://www.example.test\$request_uri;
	}
	server {
		listen 10.9.0.7:443 ssl;
		ssl_certificate $tmp/server.pem;
		ssl_certificate_key $tmp/server.key;
		location /.well-known/acme-challenge/ { alias $lookout/www/; }
	}
	server {
		listen [fd00:9::6]:80;
		return 200 "something else";
	}
}
END

# liar.c: a name server and, at port 80, a web server.  The first label, or
# the Host, says how they answer.
cat >"$lookout/liar.c" <<'END'
#include <sys/socket.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static unsigned char m[66000];
static size_t n;

static void
put(const void *p, size_t k)
{
	memcpy(m + n, p, k);
	n += k;
}

/* A record of the name in the question. */
static void
record(int section, int type, const void *data, size_t k)
{
	unsigned char head[] = { 0xc0, 12, 0, type, 0, 1, 0, 0, 0, 0, k >> 8,
	    k };

	put(head, sizeof head);
	put(data, k);
	if (!++m[section + 1])
		m[section]++;
}

/* Answer the question in m; false if there shall be no answer. */
static int
answer(int tcp)
{
	char kind[64] = "";
	size_t at = 12, last = 12;
	unsigned char *end;
	int type, extended = m[11];

	/* The label before liar.test; _acme-challenge stands before it. */
	while (m[at]) {
		if (memcmp(m + at, "\4liar", 5) != 0 &&
		    memcmp(m + at, "\4test", 5) != 0)
			last = at;
		at += m[at] + 1;
	}
	snprintf(kind, sizeof kind, "%.*s", m[last], m + last + 1);
	end = m + at + 1;
	type = end[1];
	n = at + 5;
	m[2] = 0x84;
	m[3] = 0;
	memset(m + 6, 0, 6);
	if (strcmp(kind, "liar") == 0 && type == 2) {
		record(6, 2, "\2ns\xc0\x0c", 5);
		return 1;
	}
	if (strcmp(kind, "ns") == 0) {
		if (type == 1)
			record(6, 1, "\12\11\0\4", 4);
		return 1;
	}
	if (strcmp(kind, "half") == 0) {	/* the resolver gives up */
		if (type == 1)
			record(6, 1, "\12\11\0\6", 4);
		if (type == 28)
			m[3] = 2;
		return 1;
	}
	if (type != 16) {
		record(8, 6, "\2ns\4liar\4test\0\0\0\0\0\1\0\0\0\1"
		    "\0\0\0\1\0\0\0\1\0\0\0\1", 35);
		m[at + 6] = at - 10;	/* its owner is liar.test */
		return 1;
	}
	if (strcmp(kind, "silent") == 0)
		return 0;
	if (strcmp(kind, "id") == 0)
		m[0]++;
	if (strcmp(kind, "question") == 0)
		m[13] ^= 1;
	if (strcmp(kind, "echo") == 0)
		m[2] = 0;
	if (strcmp(kind, "none") == 0)		/* no question */
		m[5] = 0;
	if (strcmp(kind, "format") == 0 || strcmp(kind, "old") == 0) {
		if (extended)			/* it has no EDNS */
			m[3] = *kind == 'f' ? 1 : 4;
		else
			record(6, 16, "\1x", 2);
	}
	if (strcmp(kind, "circle") == 0) {	/* a name that is itself */
		m[7] = 1;
		put("\xc0", 1);
		put((unsigned char[]){ n - 1, 0, 16, 0, 1, 0, 0, 0, 0 }, 9);
	}
	if (strcmp(kind, "count") == 0)
		memset(m + 6, 0xff, 6);
	if (strcmp(kind, "length") == 0) {
		record(6, 16, "\5short", 6);
		m[n - 7] = 0xff;
	}
	if (strcmp(kind, "head") == 0) {	/* a record without its end */
		record(6, 16, "", 0);
		n--;
	}
	if (strcmp(kind, "strings") == 0)
		record(6, 16, "\377short", 6);
	if (strcmp(kind, "stub") == 0)
		n = 11;
	if (strcmp(kind, "error") == 0)
		m[3] = 9;
	if (strcmp(kind, "chain") == 0) {	/* always another name */
		unsigned char name[] = "\10xxxxxxxx\5chain\4liar\4test";

		for (int i = 1; i < 9; i++)
			name[i] = 'a' + rand() % 26;
		record(6, 5, name, sizeof name);
	}
	if (strcmp(kind, "deep") == 0) {	/* always a zone below */
		m[2] = 0x80;
		record(8, 2, "\2ns\4liar\4test", 14);
	}
	if (strcmp(kind, "nobody") == 0) {	/* a server without a name */
		m[2] = 0x80;
		record(8, 2, "", 0);
	}
	if (strcmp(kind, "beside") == 0) {	/* a zone not above the name */
		m[2] = 0x80;
		put("\4side\4liar\4test\0\0\2\0\1\0\0\0\0\0\2\xc0\x0c", 28);
		m[9]++;
	}
	if (strcmp(kind, "glue") == 0) {	/* addresses that are none */
		m[2] = 0x80;
		record(8, 2, "\xc0\x0c", 2);
		record(10, 1, "\12\11\0", 3);
		record(10, 28, "\12\11\0\4", 4);
		record(10, 16, "\12\11\0\4", 4);
	}
	if (strcmp(kind, "storm") == 0) {	/* many servers */
		m[2] = 0x80;
		for (int i = 0; i < 1000 && n < 60000; i++) {
			unsigned char name[] = "\10xxxxxxxx\4void\4liar\4test";

			for (int j = 1; j < 9; j++)
				name[j] = 'a' + rand() % 26;
			record(8, 2, name, sizeof name);
		}
	}
	if (strcmp(kind, "big") == 0)
		for (int i = 0; i < 4000 && n < 65000; i++)
			record(6, 16, "\1x", 2);
	if (strcmp(kind, "swap") == 0 && tcp)
		m[0]++;
	if (strcmp(kind, "cut") == 0 || strcmp(kind, "slow") == 0 ||
	    strcmp(kind, "swap") == 0 || n > 1232)
		m[2] |= tcp ? 0 : 2;
	if (!tcp && m[2] & 2)
		n = at + 5;
	return 1;
}

static int
bound(int type, const char *ip, int port)
{
	struct sockaddr_in a = { .sin_family = AF_INET,
	    .sin_port = htons(port) };
	int fd = socket(AF_INET, type, 0), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	inet_pton(AF_INET, ip, &a.sin_addr);
	if (bind(fd, (void *)&a, sizeof a) != 0)
		perror(ip);
	if (type == SOCK_STREAM)
		listen(fd, 99);
	return fd;
}

static void
dns_tcp(int fd)
{
	unsigned char size[2];

	if (recv(fd, size, 2, MSG_WAITALL) != 2 ||
	    recv(fd, m, size[1], MSG_WAITALL) < 12)
		return;
	answer(1);
	size[0] = n >> 8;
	size[1] = n;
	write(fd, size, 2);
	if (memmem(m, n, "\4slow", 5))
		for (size_t i = 0; i < n; i++) {
			write(fd, m + i, 1);
			sleep(1);
		}
	else if (memmem(m, n, "\3cut", 4))
		write(fd, m, n / 2);
	else
		write(fd, m, n);
}

static void
web(int fd)
{
	char b[4096] = "", *host;
	static char xs[1 << 20];

	memset(xs, 'x', sizeof xs);
	read(fd, b, sizeof b - 1);
	host = strstr(b, "Host: ") ? strstr(b, "Host: ") + 6 : b;
#define IS(word) (strncmp(host, word ".", sizeof word) == 0)
#define AT(path) (strncmp(b, "GET " path " ", sizeof path + 4) == 0)
#define SAY(text) write(fd, text, sizeof text - 1)
#define TO(url) SAY("HTTP/1.1 302 Found\r\nLocation: " url \
    "\r\nContent-Length: 0\r\n\r\n")
	if (IS("circle"))
		TO("/again");
	if (IS("within"))
		TO("x?next=http://a/");
	if (IS("steps")) {
		if (AT("/?a/b"))
			TO("x/y?z=/");
		else if (AT("/x/y?z=/"))
			TO("z");
		else if (AT("/x/z"))
			TO("//lost.example.test/a#b");
		else
			TO("http://steps.example.test?a/b");
	}
	if (IS("port"))
		TO("http://port.liar.test:8080/x");
	if (IS("scheme"))
		TO("ftp://port.liar.test/x");
	if (IS("empty"))
		TO("");
	if (IS("void"))
		SAY("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
	if (IS("control"))
		TO("http://a\033[2Jb/");
	if (IS("garbage"))
		write(fd, xs, sizeof xs);
	if (IS("head")) {
		SAY("HTTP/1.1 200 OK\r\nX: ");
		write(fd, xs, sizeof xs);
	}
	if (IS("body")) {
		SAY("HTTP/1.1 200 OK\r\n\r\n");
		write(fd, xs, sizeof xs);
	}
	if (IS("dumb"))
		sleep(60);
	if (IS("drip"))
		for (SAY("HTTP/1.1 200 OK\r\n\r\n"); SAY("x") == 1; )
			sleep(1);
	if (IS("terminal"))
		SAY("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"
		    "a\n\033[2J\r\nb");
	if (IS("tls"))
		TO("https://odd.example.test/");
}

int
main(void)
{
	struct sockaddr_storage who;
	struct pollfd p[] = {
	    { bound(SOCK_DGRAM, "10.9.0.4", 53), POLLIN, 0 },
	    { bound(SOCK_STREAM, "10.9.0.4", 53), POLLIN, 0 },
	    { bound(SOCK_STREAM, "10.9.0.8", 80), POLLIN, 0 },
	    { bound(SOCK_STREAM, "10.9.0.8", 443), POLLIN, 0 } };

	signal(SIGCHLD, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	for (;;) {
		socklen_t len = sizeof who;

		poll(p, 4, -1);
		if (p[0].revents && recvfrom(p[0].fd, m, sizeof m, 0,
		    (void *)&who, &len) > 12 && answer(0))
			sendto(p[0].fd, m, n, 0, (void *)&who, len);
		for (int i = 1; i < 4; i++) {
			int fd = -1;

			if (p[i].revents)
				fd = accept(p[i].fd, NULL, NULL);

			if (fd >= 0 && fork() == 0) {
				if (i == 1)
					dns_tcp(fd);
				else
					web(fd);
				_exit(0);
			}
			if (fd >= 0)
				close(fd);
		}
	}
}
END
cc -w -D_GNU_SOURCE -o "$lookout/liar" "$lookout/liar.c" || exit

# A name server of bind: NAME ADDRESS RECURSION ZONES.
bind_conf() {
	cat >"$lookout/$1.conf" <<-END
	options {
		directory "$lookout"; listen-on { $2; };
		listen-on-v6 { ${5-none}; };
		pid-file "$lookout/$1.pid"; session-keyfile none;
		recursion $3; allow-query { any; }; notify no;
		dnssec-validation no; check-names primary ignore;
		max-cache-ttl 1; max-ncache-ttl 1;
	};
	controls { };
	$4
	END
}
zone_is() { echo "zone \"$1\" { type primary; file \"$lookout/$2\"; };"; }
bind_conf res 127.0.0.1 yes "$(zone_is . root.zone)
zone \"test\" { type static-stub; server-addresses { 10.9.0.1; }; };"
printf '%s\n' '$TTL 1' '@ SOA a.test. b.test. 1 2 3 4 1' '@ NS ns' \
    'ns A 127.0.0.1' >"$lookout/root.zone"
bind_conf par 10.9.0.1 no "$(zone_is test test.zone)
$(zone_is other.test par.db)"
bind_conf n1 10.9.0.2 no "$(zone_is example.test n1.db)" fd00:9::2
bind_conf n2 10.9.0.3 no "$(zone_is example.test n2.db)
$(zone_is signed.test signed.db)"
echo 1 >"$lookout/serial"
# zone_text FILE: a zone with the common records and those of FILE.
zone_text() {
	printf '%s\n' '$TTL 1' "@ SOA a.test. b.test. $(cat "$lookout/serial") \
2 3 4 1"
	case $1 in
	par)	echo '@ NS a.test.' ;;
	*)	cat "$lookout/example.zone" ;;
	esac
	cat "$lookout/$1.txt"
}
for server in par n1 n2; do
	: >"$lookout/$server.txt"
	zone_text $server >"$lookout/$server.db"
done
zone_text n2 >"$lookout/signed.db"

cat >look.sh <<'END'
busybox ip link set lo up
for i in 1 2 3 4 5 6 7 8; do
	busybox ip addr add 10.9.0.$i/32 dev lo
done
busybox ip addr add fd00:9::2/128 dev lo
busybox ip addr add fd00:9::6/128 dev lo
mount --bind "$1/resolv.conf" /etc/resolv.conf
mount --bind "$1/hosts" /etc/hosts
started=
for server in res par n1 n2; do
	named -c "$1/$server.conf" -f &
	started="$started $!"
done
"$1/liar" &
started="$started $!"
nginx -c "$1/nginx.conf" -p "$1" -e "$1/nginx.log" &
started="$started $!"
PEBBLE_VA_NOSLEEP=1 PEBBLE_AUTHZREUSE=0 "$2/pebble" -config "$1/pebble.json" \
    -dnsserver 127.0.0.1:53 &
started="$started $!"
trap 'kill $started $!; exit' TERM
echo $$ >"$1/pid"
while :; do
	sleep 1000 &
	wait $!
done
END
echo 'nameserver 127.0.0.1' >"$lookout/resolv.conf"
printf '%s\n' '127.0.0.1 localhost' '10.9.0.8 empty.hosted.test' \
    >"$lookout/hosts"
cat >"$lookout/pebble.json" <<END
{ "pebble": {
	"listenAddress": "127.0.0.1:14000",
	"managementListenAddress": "127.0.0.1:15000",
	"certificate": "$tmp/server.pem", "privateKey": "$tmp/server.key",
	"httpPort": 80, "tlsPort": 443, "keyAlgorithm": "ecdsa",
	"retryAfter": { "authz": 1, "order": 1 },
	"profiles": { "default": {
		"description": "x", "validityPeriod": 7776000 } }
} }
END
# They stay until look_stop: with_servers runs in them what is fetched.
own=-rnm enter='-U --preserve-credentials'
[ "$(id -u)" != 0 ] || own=-nm enter=
be_server unshare $own sh look.sh "$lookout" "$bin" >look.log 2>&1 &
look_pid=$!
pids="$pids $look_pid"
await [ -s "$lookout/pid" ]
# look COMMAND...: run it there.
look() {
	# shellcheck disable=SC2086	# options
	nsenter $enter -t "$look_pid" -n -m --wd="$PWD" \
	    env ACME_DIRECTORY=https://localhost:14000/dir "$@"
}
await look curl -sS --fail --cacert ca.pem https://localhost:15000/roots/0
unset ACME_ACCOUNT
account_key=$ACME_KEY
ACME_KEY=$tmp/look.key
check 'all of them' '
    acme-step key -o look.key && acme-step key -o shown.key &&
    await look curl -sS --fail --cacert ca.pem \
	https://localhost:15000/roots/0 &&
    await look dig +short @127.0.0.1 web.example.test &&
    look dig +short @127.0.0.1 web.example.test | grep 10.9.0.5 &&
    await look curl -sS http://10.9.0.6/ &&
    look curl -sS --cacert ca.pem https://localhost:15000/roots/0 >look.root &&
    look acme-step new-account -y >look.account'
ACME_ACCOUNT=$tmp/look.account
export ACME_ACCOUNT

# zone SERVER [LINE]...: it has these records, too, from now on.
zone() {
	server=$1; shift
	printf '%s\n' "$@" >"$lookout/$server.txt"
	serial=$(($(cat "$lookout/serial") + 1))
	echo $serial >"$lookout/serial"
	zone_text "$server" >"$lookout/$server.db"
	zone=example.test
	[ $server != par ] || zone=other.test
	case $server in par) at=10.9.0.1 ;; n1) at=10.9.0.2 ;; *) at=10.9.0.3
	esac
	kill -HUP "$(cat "$lookout/$server.pid")"
	await eval "look dig +short @$at SOA $zone | grep -w $serial"
}
# records RECORD: its challenges as lines of a zone.
records() {
	while read -r word _ _ _ _ name content; do
		[ "$word" != challenge ] || echo "$name. TXT \"$content\""
	done <"$1"
}
# order TYPE NAME...: a record with its challenges, in look.rec.  Pebble uses
# some authorizations again: such an order lacks a challenge.
order() {
	type=$1; shift
	for _ in 1 2 3 4 5; do
		look acme-step new-order "$@" >look.new &&
		look acme-step challenges -t "$type" <look.new >look.rec ||
		    return
		[ "$(grep -c ^challenge look.rec)" != $# ] || return 0
	done
	echo "no order with all challenges"
	return 1
}
# told: how often Pebble was asked to validate.
told() { grep -c 'POST /chalZ' look.log; }
# seen [OPTION]...: respond sees what is published, and the CA as well.
seen() {
	look acme-step respond -c -v "$@" <look.rec >look.ready 2>err ||
	    { cat err; return 1; }
	cat err
	grep -x 'status ready' look.ready && not grep ': not ' err
}
# unseen WORDS [OPTION]...: it exits 75, says so, and does not ask the CA.
unseen() {
	words=$1 before=$(told); shift
	look acme-step respond -c "$@" <look.rec >out 2>err
	[ $? = 75 ] || { cat err; return 1; }
	cat err
	! [ -s out ] && [ "$(grep -c '' err)" = 1 ] &&
	grep -q '^acme-step: respond: not yet: ' err &&
	grep -q -e "$words" err &&
	grep -q '; the CA was not asked to validate$' err &&
	[ "$(told)" = "$before" ] && [ -z "$(ls "$lookout/www")" ]
}

group 'looks: http-01'
check 'a file that the web server shows' '
    order http-01 web.example.test && seen -w "$lookout/www" &&
    grep "^acme-step: respond: web.example.test: 10.9.0.5: as published$" err &&
    look acme-step finalize -K shown.key -o shown.pem <look.ready &&
    cp look.root root.pem && issued shown.key shown.pem DNS:web.example.test'
check 'a web server with a wrong root' '
    order http-01 lost.example.test &&
    unseen "lost.example.test: 10.9.0.5: status 404;" -s 2 -w "$lookout/www"'
check 'a file that comes late' '
    order http-01 web.example.test || exit 1
    set -- $(grep ^challenge look.rec)
    { sleep 2; printf "%s\n" "$7" >"$lookout/www/$6"; } &
    seen -s 20 && grep "10.9.0.5: status 404" err; status=$?
    wait; rm -f "$lookout/www/"*; exit $status'
check 'a redirect to https, with a certificate of nobody' '
    order http-01 away.example.test && seen -w "$lookout/www" &&
    grep "10.9.0.7 (https://www.example.test/.well-known/.*): as published" err'
check 'an IPv6 address that shows something else' '
    order http-01 six.example.test &&
    unseen "fd00:9::6: other content: something else;" -s 1 \
	-w "$lookout/www" && not grep 10.9.0.5 err'
check 'an address of which only one is right' '
    order http-01 closed.example.test &&
    unseen "10.9.0.1: cannot connect to port 80: Connection refused" -s 1 \
	-w "$lookout/www"'
check 'an address to which this machine has no way is left out' '
    order http-01 far.example.test && before=$(told) &&
    { look acme-step respond -c -v -w "$lookout/www" <look.rec >out 2>err
    cat err; grep "2001:db8::1: cannot be reached from here: Network" err &&
    grep "10.9.0.5: as published" err && [ "$(told)" != "$before" ]; }'
check 'but not the only one' '
    order http-01 farther.example.test &&
    unseen "farther.example.test: nothing of it can be reached from here" \
	-s 1 -w "$lookout/www"'
check 'more addresses than are looked at' '
    seq -f "lots A 10.9.1.%g" 20 >many && zone n1 "$(cat many)" &&
    zone n2 "$(cat many)" && order http-01 lots.example.test &&
    unseen "lots.example.test: address of .*: has more than 16 of a family" \
	-s 1 -w "$lookout/www"'
check 'a name without an address' '
    order http-01 none.example.test &&
    unseen "none.example.test: address of none.example.test: Name" -s 1 \
	-w "$lookout/www"'
check 'an address that /etc/hosts gives' '
    order http-01 empty.hosted.test &&
    unseen "empty.hosted.test: 10.9.0.8: status 302" -s 1 -w "$lookout/www"'
check 'an address to which nobody can connect' '
    zone n1 "link AAAA fe80::1" && zone n2 "link AAAA fe80::1" &&
    order http-01 link.example.test &&
    unseen "link.example.test: fe80::1: cannot connect to port 80: Invalid" \
	-s 1 -w "$lookout/www"'
check 'a wildcard, and a type that nobody knows' '
    order http-01 web.example.test &&
    sed -i "/^challenge/s/ dns web/ dns *.web/" look.rec &&
    unseen "[*].web.example.test: nothing of it can be reached from here" \
	-s 1 -w "$lookout/www" &&
    sed -i "/^challenge/s/http-01 dns [*]./other-01 dns /" look.rec &&
    unseen "web.example.test: nothing of it can be reached from here" -s 1'
check 'an address that -H gives' '
    order http-01 none.example.test && before=$(told) &&
    { look acme-step respond -c -v -w "$lookout/www" -H x.test:80:10.9.0.1 \
	-H none.example.test:80:10.9.0.5 <look.rec >out 2>err
    cat err; grep "10.9.0.5: as published" err &&
    [ "$(told)" != "$before" ]; }'
for ip in 10.9.0.7 fd00:9::2; do
	listen=$ip
	case $ip in *:*) listen="[$ip]" ;; esac
	check "the address $ip, at respond -l" '
	    order http-01 $ip && seen -l "$listen:80" &&
	    grep "$ip: $ip: as published" err'
done
check 'twenty names, one of which is wrong' '
    zone n1 "*.many A 10.9.0.7" && zone n2 "*.many A 10.9.0.7" &&
    order http-01 $(seq -f "s%g.many.example.test" 19) lost.example.test &&
    unseen "not yet: lost.example.test: 10.9.0.5: status 404; the CA" -s 2 \
	-l 10.9.0.7:80'
check 'all that can be seen is told with -v, each round' '
    order http-01 lost.example.test &&
    look acme-step respond -c -v -s 3 -w "$lookout/www" <look.rec 2>err
    cat err; [ "$(grep -c "^acme-step: respond: lost.example.test: 10.9.0.5: \
status 404$" err)" -gt 1 ]'
for evil in circle='too many redirects' within='too many redirects' \
    steps='steps.* 10.9.0.5 (http://lost.example.test/a): status 404' \
    port='redirects to port 8080' \
    scheme='redirects to an invalid URL: ftp://' empty='status 302' \
    void='void.example.test: 10.9.0.8: other content: ;' \
    control='has a control character in its header' \
    garbage='larger than 16 KiB' head='larger than 16 KiB' \
    body='larger than 256 KiB' dumb='no response' \
    drip='no response\|no result in time\|other content' \
    terminal='other content: a??\[2J??b' tls='does not use TLS, or\|ended'; do
	words=${evil#*=} evil=${evil%%=*}
	check "a web server that answers with: $evil" '
	    zone n1 "$evil A 10.9.0.8" && zone n2 "$evil A 10.9.0.8" &&
	    order http-01 $evil.example.test &&
	    unseen "$words" -s 1 -w "$lookout/www"'
done

group 'looks: DNS'
check 'a record at all servers' '
    order dns-01 "*.d.example.test" d.example.test &&
    zone n1 "$(records look.rec)" && zone n2 "$(records look.rec)" && seen &&
    grep "ns1.test (10.9.0.2): as published" err &&
    grep "ns1.test (fd00:9::2): as published" err &&
    grep "ns2.test (10.9.0.3): as published" err'
check 'one server is late' '
    order dns-01 d.example.test && zone n1 "$(records look.rec)" &&
    zone n2 && { (sleep 2; zone n2 "$(records look.rec)") >/dev/null 2>&1 &
    seen -s 20; } && grep "ns2.test (10.9.0.3): has 0 TXT records" err'
check 'one server is too late' '
    order dns-01 d.example.test && zone n1 "$(records look.rec)" &&
    zone n2 "_acme-challenge.d TXT old" "_acme-challenge.d TXT older" &&
    unseen "d.example.test: ns2.test (10.9.0.3): has 2 TXT records, none \
with the content; " -s 2'
check 'of a name and its wildcard, one record is missing' '
    order dns-01 "*.d.example.test" d.example.test &&
    records look.rec | head -n 1 >half && zone n1 "$(cat half)" &&
    zone n2 "$(cat half)" && unseen "has 1 TXT records, none" -s 1'
check 'an alias in another zone' '
    order dns-01 alias.example.test far.alias.example.test && zone n1 &&
    zone n2 && zone par "$(records look.rec | sed "s/^[^ ]*/elsewhere/")" &&
    seen && grep "elsewhere.other.test at a.test (10.9.0.1): as pub" err'
check 'an alias that leads to other contents' '
    order dns-01 alias.example.test && zone par "elsewhere TXT x" &&
    unseen "elsewhere.other.test at a.test (10.9.0.1): has 1 TXT" -s 1'
check 'servers that do not agree about an alias' '
    order dns-01 e.example.test && zone par "x $(records look.rec |
    sed "s/^[^ ]*//")" && zone n1 "_acme-challenge.e CNAME x.other.test." &&
    zone n2 "_acme-challenge.e CNAME y.other.test." &&
    unseen "has it as an alias of [xy].other.test" -s 1'
check 'servers of which one has an alias, and one a delegation' '
    order dns-01 e.example.test && zone par "x $(records look.rec |
    sed "s/^[^ ]*//")" && zone n1 "_acme-challenge.e CNAME x.other.test." &&
    zone n2 "_acme-challenge.e NS ns.given" &&
    unseen "another server has an alias" -s 1 -l 10.9.0.6:53'
check 'servers that delegate to different ones, of which one is old' '
    order dns-01 e.example.test && zone n1 "_acme-challenge.e NS a.test." &&
    zone n2 "_acme-challenge.e NS ns.given" &&
    unseen "e.example.test: a.test (10.9.0.1): " -s 1 -l 10.9.0.6:53'
check 'an alias of a zone, above the record' '
    order dns-01 aka.example.test && for server in n1 n2; do
	zone $server "aka CNAME other.test." "$(records look.rec)" || exit
    done && seen && grep "ns2.test (10.9.0.3): as published" err &&
    not grep "10.9.0.1" err'
check 'names without name servers, and aliases of them' '
    order dns-01 d.invalid &&
    unseen "_acme-challenge.d.invalid: cannot find its name servers" -s 2 &&
    order dns-01 e.example.test && for server in n1 n2; do
	zone $server "_acme-challenge.e CNAME x.invalid." || exit
    done && unseen "e.example.test: x.invalid: cannot find its name serv" -s 2'
check 'a name that ends with a dot' '
    order dns-01 d.example.test && zone n1 "$(records look.rec)" &&
    zone n2 "$(records look.rec)" &&
    sed -i "s/ _acme-challenge.d.example.test/&./" look.rec && seen &&
    grep "ns2.test (10.9.0.3): as published" err'
label=$(seq -s '' 40 | head -c 55)
check 'a name that is too long with what stands before it' '
    order dns-01 ab$label.$label.$label.$label.example.test &&
    unseen "ns2.test (10.9.0.3): is not a name for DNS" -s 1'
check 'more places than are looked at, and no way to any' '
    ns=ns._acme-challenge.crowd && { echo "_acme-challenge.crowd NS $ns"
    seq -f "$ns A 10.9.1.%g" 70; } >many && zone n1 "$(cat many)" &&
    zone n2 "$(cat many)" && order dns-01 crowd.example.test &&
    unseen "not yet: crowd.example.test: $ns.example.test (10.9.1.[0-9]*): \
too many places, or out of time" -s 2'
check 'aliases in a circle' '
    order dns-01 circle.example.test &&
    unseen "too many aliases and delegations" -s 1'
for name in given below; do
	check "a delegation to respond -l: $name" '
	    order dns-01 $name.example.test "*.$name.example.test" &&
	    seen -l 10.9.0.6:53 && grep "(10.9.0.6): as published" err'
done
check 'a delegation to a server that does not have the zone' '
    order dns-01 lame.example.test &&
    unseen "a.test (10.9.0.1): is not a name server of this zone\|RCODE 5" \
	-s 1'
check 'a delegation to a host without a server' '
    order dns-01 shut.example.test &&
    unseen "shut.example.test (10.9.0.5): cannot connect to port 53: Conn" \
	-s 1'
check 'a server whose name has no address' '
    order dns-01 nowhere.example.test &&
    unseen "cannot find the address of its name server nowhere.test" -s 2'
check 'a server whose name has an IPv4 address, and others nobody knows' '
    order dns-01 half.example.test && unseen "cannot find the address of its \
name server half.liar.test" -s 12 -l 10.9.0.6:53'
long=$(seq -s . 200 400 | head -c 240)
check 'more than a datagram has: TCP' '
    order dns-01 d.example.test &&
    { records look.rec; for i in 1 2 3 4 5 6 7 8 9; do
	echo "_acme-challenge.d TXT $i$long"
    done; } >many && zone n1 "$(cat many)" && zone n2 "$(cat many)" &&
    look dig +notcp +ignore @10.9.0.2 TXT _acme-challenge.d.example.test |
    grep "flags: qr aa tc" && seen'
check 'the persistent one, in several strings' '
    order dns-persist-01 d.example.test &&
    records look.rec | sed "s/TXT \"\(.\{9\}\)\(.*\)\"/TXT \"\1\" \"\2\"/" >a &&
    cat a && zone n1 "$(cat a)" && zone n2 "$(cat a)" && seen'
check 'the one for an account' '
    order dns-account-01 d.example.test && zone n1 "$(records look.rec)" &&
    zone n2 "$(records look.rec)" && seen'
check 'a signed zone, whose answers have more than 512 bytes' '
    order dns-01 d.signed.test && { printf "%s\n" "\$TTL 1" \
	"@ SOA a.test. b.test. 2 2 3 4 1" "@ NS ns2.test." &&
    records look.rec; } >"$lookout/signed.plain" &&
    with_servers dnssec-keygen -K "$lookout" -a RSASHA256 -b 4096 \
	signed.test 2>&1 && with_servers dnssec-keygen -K "$lookout" \
	-a RSASHA256 -b 2048 -f KSK signed.test 2>&1 &&
    with_servers dnssec-signzone -S -K "$lookout" -o signed.test \
	-N unixtime -f "$lookout/signed.db" "$lookout/signed.plain" 2>&1 &&
    kill -HUP "$(cat "$lookout/n2.pid")" &&
    await eval "look dig +dnssec @10.9.0.3 TXT _acme-challenge.d.signed.test |
	grep RRSIG" && look dig +dnssec @10.9.0.3 TXT \
	_acme-challenge.d.signed.test | grep "SIZE *rcvd: [5-9][0-9][0-9]" &&
    seen'
# A machine that is busy may have no time left to wait for an answer.
mute='does not answer\|no result in time'
for evil in silent="$mute" id="$mute" question="$mute" echo="$mute" \
    none="$mute" format='has 1 TXT records, none' \
    old='has 1 TXT records, none' head='has 0 TXT records, none' \
    beside='is not a name server of this zone' \
    glue='the address of its name server _acme-challenge.glue.liar.test' \
    swap='its answer over TCP is for another question' \
    circle='has 0 TXT records, none' \
    count='has 0 TXT records, none' length='has 0 TXT records, none' \
    strings='has 1 TXT records' stub="$mute" \
    error='answers with RCODE 9' chain='too many aliases' \
    nobody='is delegated to no name server' \
    deep='no result in time\|too many\|is not a name server' \
    storm='too many\|no result in time\|out of time\|cannot find the addr' \
    big='has [0-9]* TXT records, none' cut='its answer over TCP is incomplete' \
    slow='its answer over TCP is incomplete'; do
	words=${evil#*=} evil=${evil%%=*}
	check "a name server that answers with: $evil" '
	    order dns-01 $evil.liar.test && unseen "$words" -s 2'
done
check 'the resolver is silent' '
    order dns-01 d.example.test && kill -STOP "$(cat "$lookout/res.pid")" &&
    unseen "no result in time\|cannot find its name servers" -s 4
    status=$?; kill -CONT "$(cat "$lookout/res.pid")"; exit $status'

group 'looks: tls-alpn-01'
check 'the responder' '
    order tls-alpn-01 www.example.test web.example.test &&
    not seen -l 10.9.0.5:443 2>/dev/null
    order tls-alpn-01 web.example.test lost.example.test &&
    seen -l 10.9.0.5:443 && grep "lost.example.test: 10.9.0.5: as pub" err'
for ip in 10.9.0.6 fd00:9::2; do
	listen=$ip
	case $ip in *:*) listen="[$ip]" ;; esac
	check "the address $ip" '
	    order tls-alpn-01 $ip && seen -l "$listen:443"'
done
check 'a server without the protocol' '
    order tls-alpn-01 www.example.test &&
    unseen "10.9.0.7: TLS with www.example.test failed: it does not know the" \
	-s 1'
check 'a name without an address' '
    order tls-alpn-01 none.example.test &&
    unseen "none.example.test: address of none.example.test: Name" -s 1'
check 'a server that does not speak TLS' '
    zone n1 "odder A 10.9.0.8" && zone n2 "odder A 10.9.0.8" &&
    order tls-alpn-01 odder.example.test &&
    unseen "10.9.0.8: TLS with odder.example.test failed" -s 1'
for evil in 'another digest' 'another name' 'a second name' \
    'nothing critical' 'no protocol'; do
	check "a server with $evil" '
	    order tls-alpn-01 web.example.test &&
	    set -- $(grep ^challenge look.rec) &&
	    sum=$7 name=$6 critical=critical, alpn="-alpn acme-tls/1"
	    case $evil in
	    *digest)	sum=$(echo x | sha256sum | cut -d " " -f 1) ;;
	    another*)	name=www.example.test ;;
	    *name)	name=$name,DNS:www.example.test ;;
	    *critical)	critical= ;;
	    *protocol)	alpn= ;;
	    esac
	    openssl req -x509 -newkey ec -nodes \
		-pkeyopt ec_paramgen_curve:P-256 -keyout alpn.key \
		-out alpn.pem -subj /CN=x \
		-addext "subjectAltName=DNS:$name" \
		-addext "1.3.6.1.5.5.7.1.31=${critical}DER:0420$sum" \
		2>/dev/null &&
	    { look openssl s_server -accept 10.9.0.5:443 -cert alpn.pem -key \
		alpn.key $alpn -quiet </dev/zero >/dev/null 2>&1 &
	    sleep 0.5
	    case $evil in
	    *name)	words="its certificate is not for this name alone" ;;
	    *protocol)	words="does not know the protocol acme-tls/1" ;;
	    *)		words="its certificate has another acmeIdentifier" ;;
	    esac
	    unseen "10.9.0.5: $words" -s 1; status=$?
	    pkill -f "s_server -accept 10.9.0.5"; exit $status; }'
done

group 'looks: what goes with -c, and the end of a step'
check 'a hook publishes' '
    cat >look.hook <<-"END"
	#!/bin/sh
	case $1 in deploy_challenge) printf %s "$4" >"$WWW/$3" ;;
	*) rm "$WWW/$3" ;; esac
	END
    chmod +x look.hook && order http-01 web.example.test &&
    WWW=$lookout/www seen -x ./look.hook && [ -z "$(ls "$lookout/www")" ]'
check 'and cleans up if it is not seen' '
    order http-01 lost.example.test &&
    WWW=$lookout/www unseen "status 404" -s 1 -x ./look.hook'
check 'with -n the CA is told after that' '
    order http-01 web.example.test && before=$(told) &&
    set -- $(grep ^challenge look.rec) && not look acme-step respond -c -n \
	-s 1 <look.rec && [ "$(told)" = "$before" ] &&
    printf %s "$7" >"$lookout/www/$6" &&
    look acme-step respond -c -n <look.rec && [ "$(told)" -gt "$before" ]
    status=$?; rm -f "$lookout/www/$6"; exit $status'
check 'the time limit of the step leaves time to say it' '
    order http-01 lost.example.test &&
    unseen "status 404" -T 4 -w "$lookout/www"'
check 'a signal ends the step, and all that looks' '
    order dns-01 silent.liar.test && { look acme-step respond -c <look.rec \
	-s 25 >out 2>err & pid=$!; looking="^acme-step respond -c -s 25"
    await eval "[ \$(pgrep -c -f \"\$looking\") = 2 ]" &&
    kill -TERM $(pgrep -o -f "$looking") && wait $pid
    [ $? = 143 ] && cat err && grep "ended by signal 15" err &&
    [ "$(pgrep -c -f "$looking")" = 0 ]; }'
check 'what looks is stopped, and the step does not wait for it' '
    order dns-01 silent.liar.test && { look acme-step respond -c -s 3 \
	<look.rec >out 2>err & pid=$!
    await eval "looker=\$(pgrep -P \$(pgrep -P $pid))" &&
    kill -STOP $looker && ! wait $pid && cat err &&
    grep "not yet: silent.liar.test: no result in time; the CA" err &&
    [ ! -e /proc/$looker ]; }'
# confined: $looker can do nothing but look.
confined() {
	grep "Max processes  *0 " "/proc/$looker/limits" &&
	grep "Max file size  *0 " "/proc/$looker/limits" &&
	! tr '\0' '\n' <"/proc/$looker/environ" | grep -a . &&
	{ [ "$(id -u)" != 0 ] ||
	    grep "^Uid:.65534.65534" "/proc/$looker/status"; } &&
	[ "$(readlink "/proc/$looker/fd/"* | grep -c pipe:)" = 3 ]
}
check 'what looks has no rights' '
    order dns-01 silent.liar.test && { look acme-step respond -c -s 9 \
	<look.rec >out 2>err & pid=$!
    await eval "looker=\$(pgrep -P \$(pgrep -P $pid))" && await confined
    status=$?; ls -l /proc/$looker/fd; cat /proc/$looker/limits
    kill $(pgrep -P $pid); wait; exit $status; }'
dies 64 '-s must be at least 1 with -c (see acme-step help respond)' \
    'acme-step respond -c -s 0 <look.rec'
dies 64 '-c cannot be used with -B' \
    'ACME_DIRECTORY= acme-step respond -t http-01 -c -B look.box <look.rec'
kill "$look_pid"
ACME_KEY=$account_key

group 'hooks, before Pebble'
web=$web_server dns=$dns_server
pebble_start
unset ACME_ACCOUNT
check 'an account' 'acme-step new-account -y >account'
export ACME_ACCOUNT=$tmp/account
# As the conventions' documentation has them, for this web server and the
# test server that answers for DNS.
cat >lib.sh <<END
txt() { curl -sS --fail -d "\$2" "http://127.0.0.1:$dns_control/\$1"; }
www=$www
END
cat >dehydrated.sh <<'END'
#!/usr/bin/env bash
. ./lib.sh
deploy_challenge() {
    local DOMAIN="${1}" TOKEN_FILENAME="${2}" TOKEN_VALUE="${3}"
    case $TYPE in
    http) printf '%s' "$TOKEN_VALUE" >"$www/$TOKEN_FILENAME" ;;
    dns) txt set-txt "{\"host\": \"_acme-challenge.$DOMAIN.\",
	\"value\": \"$TOKEN_VALUE\"}" ;;
    esac
}
clean_challenge() {
    local DOMAIN="${1}" TOKEN_FILENAME="${2}" TOKEN_VALUE="${3}"
    case $TYPE in
    http) rm "$www/$TOKEN_FILENAME" ;;
    dns) txt clear-txt "{\"host\": \"_acme-challenge.$DOMAIN.\"}" ;;
    esac
}
HANDLER="$1"; shift
if [[ "${HANDLER}" =~ ^(deploy_challenge|clean_challenge|deploy_cert)$ ]]; then
  "$HANDLER" "$@"
fi
END
cat >uacme.sh <<'END'
#!/bin/sh
. ./lib.sh
METHOD=$1 TYPE=$2 IDENT=$3 TOKEN=$4 AUTH=$5
case "$METHOD" in
"begin")
	case "$TYPE" in
	http-01) echo -n "$AUTH" >"$www/$TOKEN" ;;
	*)	exit 1 ;;
	esac ;;
"done"|"failed")
	case "$TYPE" in
	http-01) rm "$www/$TOKEN" ;;
	esac ;;
esac
END
cat >lego.sh <<'END'
#!/bin/sh
. ./lib.sh
case $1 in
present) txt set-txt "{\"host\": \"$2\", \"value\": \"$3\"}" ;;
cleanup) txt clear-txt "{\"host\": \"$2\"}" ;;
esac
END
cat >auth.sh <<'END'
#!/bin/sh
. ./lib.sh
txt set-txt "{\"host\": \"_acme-challenge.$CERTBOT_DOMAIN.\",
    \"value\": \"$CERTBOT_VALIDATION\"}" && echo "id of $CERTBOT_DOMAIN"
END
cat >cleanup.sh <<'END'
#!/bin/sh
. ./lib.sh
[ "$CERTBOT_AUTH_OUTPUT" = "id of $CERTBOT_DOMAIN" ] &&
txt clear-txt "{\"host\": \"_acme-challenge.$CERTBOT_DOMAIN.\"}"
END
chmod +x dehydrated.sh uacme.sh lego.sh auth.sh cleanup.sh
# by_hook TYPE HOOK: a certificate that it brings.
by_hook() {
	type=$1 hook=$2
	check "$hook, ${type:-any type}" '
	    export TYPE="${type%-01}"
	    acme-step new-order -o h.order h1.test h2.test &&
	    acme-step respond ${type:+-t "$type"} -x "$hook" <h.order 2>err |
	    acme-step finalize -K one.key.pem -o h.pem; got=$?
	    cat err; [ $got = 0 ] && ! [ -s err ] &&
	    issued one.key.pem h.pem DNS:h1.test DNS:h2.test &&
	    [ -z "$(ls "$www")" ]'
}
by_hook http-01 ./dehydrated.sh
by_hook dns-01 dehydrated:./dehydrated.sh
by_hook '' uacme:./uacme.sh
by_hook dns-01 lego:./lego.sh
by_hook dns-01 certbot:./auth.sh,./cleanup.sh

group 'a relay before Pebble: lost responses'

# relay.sh: hands requests on to Pebble, and its replies back.  The Nth
# request POST /x/y runs rules/POST_x.N, else rules/POST_x: "forward" there
# hands it on, "reply STATUS HEADERS BODY" answers it.
cat >relay.sh <<'END'
cr=$(printf '\r')
forward() {
	set -- -sS --raw --http1.1 --cacert ca.pem -i -X "$method" \
	    -H 'Content-Type: application/jose+json' -H 'Expect:' \
	    -H "Host: $host"
	case $method in
	POST)	set -- "$@" --data-binary @"relayed/body.$$" ;;
	HEAD)	set -- "$@" -I ;;
	esac
	curl "$@" "https://localhost:$pebble$path"
}
reply() {
	printf 'HTTP/1.1 %s\r\n%sContent-Length: %s\r\n\r\n%s' "$1" \
	    "${2:+$2$cr
}" "$(printf %s "$3" | wc -c)" "$3"
}
while read -r method path _; do
	name=${path#/}
	name=${method}_${name%%/*}
	echo "$name" >>relayed/requests
	n=$(grep -cxe "$name" relayed/requests)
	length=0
	while IFS= read -r line; do
		line=${line%"$cr"}
		[ "$line" ] || break
		case $line in
		[Cc]ontent-[Ll]ength:*) length=${line##* } ;;
		[Hh]ost:*) host=${line##* } ;;
		esac
	done
	head -c "$length" >"relayed/body.$$"
	if [ -e "rules/$name.$n" ]; then
		. "rules/$name.$n"
	elif [ -e "rules/$name" ]; then
		. "rules/$name"
	else
		forward
	fi
done
END
pebble_stop
pebble_start
unset ACME_ACCOUNT
relay=$(free_port)
server_start env "pebble=$pebble" socat "OPENSSL-LISTEN:$relay,\
bind=127.0.0.1,fork,reuseaddr,verify=0,cert=server.pem,key=server.key" \
    'EXEC:sh relay.sh'
up "$relay"
# relayed NAME: how many such requests there were.
relayed() { grep -cxe "$1" relayed/requests; }
# rules NAME CODE [NAME CODE]...: these, and no others.
rules() {
	rm -rf rules relayed
	mkdir rules relayed
	: >relayed/requests
	while [ $# -gt 1 ]; do
		printf '%s\n' "$2" >"rules/$1"
		shift 2
	done
}
rules
ACME_DIRECTORY=https://localhost:$relay/dir
acme-step new-account -y -o account
ACME_ACCOUNT=$tmp/account
export ACME_ACCOUNT
# through NAME...: a certificate for these names.
through() {
	acme-step new-order "$@" |
	acme-step respond -t http-01 -w "$www" |
	acme-step finalize -K one.key.pem -o relay.pem &&
	openssl x509 -in relay.pem -noout -ext subjectAltName |
	grep -i "DNS:$1"
}
check 'the relay hands everything on' 'through plain.test'
lose='forward >/dev/null; exit'
busy='reply "503 Busy" "" ""'

# What makes something is sent three times at most.
rules POST_order-plz "$lose"
dies 69 'ended before a response' 'acme-step new-order lost.test'
rules POST_order-plz 'forward >relayed/reply
    ! grep -q "^HTTP.* 201" relayed/reply ||
	{ echo made >>relayed/requests; exit; }
    cat relayed/reply'
dies 69 'ended before a response' 'acme-step new-order -T 20 lost.test'
check 'an order whose reply is always lost is placed three times at most' '
    cat relayed/requests; n=$(relayed made)
    [ "$n" -ge 2 ] && [ "$n" -le 3 ]'
for name in order-plz authZ chalZ my-order finalize-order certZ; do
	rules "POST_$name.1" "$lose"
	check "the first reply of $name is lost" "
	    through lost-$name.test"
done
# Not the response that refuses a nonce is lost, but the one that agrees.
rules POST_revoke-cert 'forward >relayed/reply
    if [ ! -e relayed/gone ] && grep -q "^HTTP.* 200" relayed/reply; then
	: >relayed/gone
	exit
    fi
    cat relayed/reply'
check 'what is revoked already is as it was asked for' '
    acme-step revoke-cert relay.pem 2>err &&
    cat err && grep "is already revoked" err'
rules POST_rollover-account-key.1 "$lose"
check 'the first reply to a key change is lost' '
    rm -f other.key.pem; acme-step key -o other.key.pem &&
    acme-step key-change -K other.key.pem >changed &&
    mv other.key.pem "$ACME_KEY"'
rules POST_sign-me-up "$lose"
dies 69 'ended before a response' '
    unset ACME_ACCOUNT; acme-step account'

group 'a relay before Pebble: server errors and batches'

# Server errors are counted for each request by itself.
rules GET_dir.1 "$busy" POST_order-plz.1 "$busy" POST_authZ.1 "$busy" \
    POST_chalZ.1 "$busy" POST_my-order.1 "$busy" POST_finalize-order.1 "$busy" \
    POST_certZ.1 "$busy"
later busy-once 'through busy.test'
settle
check 'each request meets one 503' 'replay busy-once'
within busy-once 4 20
rules POST_authZ 'case $n in [1-6]) reply "503 Busy" "Retry-After: 2" "" ;;
    *) forward ;; esac'
later busy-batch 'through busy1.test busy2.test busy3.test busy4.test \
    busy5.test busy6.test'
settle
check 'a batch of them, each with Retry-After' 'replay busy-batch'
within busy-batch 2 8
rules POST_my-order "$busy"
dies 69 503 'acme-step new-order 503.test | acme-step order -T 20'
check 'one request is tried three times' '
    [ "$(relayed POST_my-order)" = 3 ]'
rules POST_my-order 'reply "501 None" "" ""'
dies 77 501 'acme-step new-order 501.test | acme-step order'
check 'but not if it is 501' '[ "$(relayed POST_my-order)" = 1 ]'

# A server that hangs up as soon as a second request is behind the first.
rules
cat >rules/any <<'END'
if [ "$(timeout 0.1 head -c 1 | wc -c)" = 1 ]; then
	echo cut >>relayed/requests
	exit
fi
forward
END
for name in HEAD_nonce-plz POST_authZ POST_chalZ; do
	cp rules/any "rules/$name"
done
check 'requests go one by one where the server wants it so' '
    through single1.test single2.test single3.test single4.test &&
    [ "$(relayed cut)" -ge 1 ]'
rules HEAD_nonce-plz '[ "$n" -le 8 ] && forward ||
    reply "503 Busy" "Retry-After: 3600" ""'
set --
while [ $# -lt 40 ]; do set -- "$@" "few$#.test"; done
few=$*
check 'few nonces are asked for, whatever the number of names' '
    acme-step new-order $few | acme-step challenges -t http-01 >few &&
    [ "$(grep -c ^challenge few)" = 40 ] &&
    [ "$(relayed HEAD_nonce-plz)" -le 8 ]'
rules POST_order-plz.1 'forward; sleep 0.2
    reply "408 Request Timeout" "Connection: close" ""; exit' \
    POST_authZ 'forward; sleep 0.2
    reply "408 Request Timeout" "Connection: close" ""; exit'
check '408 on a connection that was idle is nobody'\''s reply' '
    through idle.test && grep -x POST_authZ relayed/requests'
rules POST_chalZ 'forward >relayed/reply
    if grep -q badNonce relayed/reply; then
	cat relayed/reply
    else
	reply "409 Conflict" "" \
	    "{\"type\":\"urn:ietf:params:acme:error:conflict\"}"
    fi'
check '409 conflict: the challenge is being validated already' '
    through conflict.test'
gone='reply "404 Not Found" "" \
    "{\"type\":\"urn:ietf:params:acme:error:malformed\"}"'
for name in authZ chalZ my-order finalize-order certZ; do
	rules "POST_$name.1" "$gone" "POST_$name.2" "$gone"
	later "lag-$name" "cd \$(mktemp -d -p \"$tmp\") &&
	    cp -r $tmp/rules $tmp/relayed . && cd $tmp && through lag.test"
	settle
	check "a replica that does not know $name yet" "replay lag-$name"
done
rules POST_my-order "$gone"
later lost-order 'acme-step new-order gone.test | acme-step order'
settle
dies 77 malformed 'replay lost-order'
within lost-order 8 14
later_than='forward | sed "/^Retry-After:/d; 1s/\$/\nRetry-After: 86400$cr/"'
rules POST_my-order "$later_than"
later retry-late 'through late.test'
settle
check 'Retry-After: 86400 for what takes seconds' 'replay retry-late'
within retry-late 0 9
rules POST_my-order "$later_than"
dies 75 'try again after 86400 s' '
    acme-step new-order never.test | acme-step order -W -T 3'
unset few

group 'a relay before Pebble: time limits and lag'

# The time limit comes while the CA still validates.
rules POST_chalZ 'reply "200 OK" "" \
    "{\"type\":\"http-01\",\"status\":\"pending\",\"token\":\"x\"}"'
acme-step new-order limit.test >limit.record
later limit 'acme-step respond -w "$www" -T 12 <limit.record'
later limit-short 'acme-step respond -w "$www" -T 6 <limit.record'
later limit-order 'acme-step order -W -T 9 <limit.record'
later limit-finalize 'acme-step finalize -K one.key.pem -T 9 <limit.record'
settle
within limit 10 12
still='while waiting for the CA to validate: the order is still pending'
dies 75 "of 12 s reached $still; .*limit.test still needs one of .*http-01.*; \
what was published is removed now, .*place a new one and raise -T\$" \
    'replay limit'
dies 75 "of 6 s reached $still.*raise -T\$" 'replay limit-short'
dies 75 'while waiting for the order: the order .*http-01[a-z0-9 -]*$' \
    'replay limit-order'
dies 75 'while waiting for the order to be ready: the order is .*pending' \
    'replay limit-finalize'
rules POST_chalZ 'reply "200 OK" "" \
    "{\"type\":\"http-01\",\"status\":\"pending\",\"token\":\"x\"}"' \
    POST_my-order 'sleep 8; exit'
dies 69 'of 3 s reached while .*what was published is removed now.*raise -T$' '
    acme-step new-order limit.test |
    acme-step respond -w "$www" -T 3'
check 'nothing is left in the web server' '[ -z "$(ls "$www")" ]'

# Boulder knows an account'\''s new key everywhere only after some seconds.
unknown='reply "400 Bad Request" "" \
    "{\"type\":\"urn:ietf:params:acme:error:malformed\",
    \"detail\":\"JWS verification error\"}"'
rules
rm -f cached.key.pem
acme-step key -o cached.key.pem
check 'a key change waits until the CA takes the new key' '
    rules POST_my-account.1 "$unknown" POST_my-account.2 "$unknown"
    acme-step key-change -K cached.key.pem 2>err >changed &&
    cat err && grep "now cached.key.pem" err && is 1 "grep -c . err" &&
    [ "$(relayed POST_my-account)" = 3 ] && mv cached.key.pem "$ACME_KEY"'
acme-step key -o cached.key.pem
rules POST_my-account "$unknown"
later late-key 'acme-step key-change -K cached.key.pem 2>&1'
settle
check 'but not for ever' '
    replay late-key && grep "not accept the new key yet; wait" late-key.out &&
    grep "now cached.key.pem" late-key.out && mv cached.key.pem "$ACME_KEY"'
within late-key 9 14
rules

group 'ways to the CA: -H and -P'
pebble_stop
pebble_start
unset ACME_ACCOUNT
acme-step new-account -y -o account
ACME_ACCOUNT=$tmp/account
export ACME_ACCOUNT
check '-H: a name that no resolver knows' '
    acme-step directory -d "https://pebble.test:$pebble/dir" \
	-H "pebble.test:$pebble:127.0.0.1" |
    grep "^new-order https://pebble.test:$pebble/"'
check '-H: several, the first that answers' '
    acme-step directory -d "https://PEBBLE.test:$pebble/dir" \
	-H "other.test:$pebble:127.0.0.9" -H "pebble.test:1:127.0.0.9" \
	-H "pebble.test:$pebble:[::1]" -H "pebble.test:$pebble:127.0.0.1"'
check 'ACME_RESOLVE' '
    ACME_RESOLVE="a.test:1:::1 pebble.test:$pebble:127.0.0.1" \
    acme-step directory -d "https://pebble.test:$pebble/dir"'
dies 78 'another name' '
    acme-step directory -d "https://other.test:$pebble/dir" \
	-H "other.test:$pebble:127.0.0.1"'
dies 69 'refused' '
    acme-step directory -d "https://pebble.test:1/dir" \
	-H "pebble.test:1:127.0.0.1" -H "pebble.test:1:::1"'
for wrong in x a:1 a:b:127.0.0.1 a:1:b :1:127.0.0.1 a:70000:127.0.0.1 a:1: \
    a:1:1.2.3; do
	dies 64 'HOST:PORT:ADDR' "acme-step directory -H '$wrong'"
	dies 64 'HOST:PORT:ADDR' "ACME_RESOLVE='$wrong' acme-step directory"
done

check '-P: through a command' '
    acme-step directory -P "socat - TCP:%h:%p" |
    grep "^new-order https://localhost:$pebble/"'
check 'ACME_PROXY_COMMAND, for a whole order' '
    ACME_PROXY_COMMAND="socat - TCP:127.0.0.1:%p"
    export ACME_PROXY_COMMAND
    acme-step new-order piped.test |
    acme-step respond -t http-01 -w "$www" |
    acme-step finalize -K one.key.pem -o piped.pem &&
    issued one.key.pem piped.pem DNS:piped.test'
check '%% and an address' '
    acme-step directory -d "https://127.0.0.1:$pebble/dir" \
	-P "sh -c \"echo %h %p %% >seen; exec socat - TCP:%h:%p\"" &&
    grep -x "127.0.0.1 $pebble %" seen'
dies 69 'false.* failed with status 1' 'acme-step directory -P false'
check 'a command that cannot be run' '
    acme-step directory -P "nosuch %h" 2>err
    [ $? = 69 ] && grep "the command nosuch failed with status 127" err'
dies 69 'ended by signal 9' \
    "acme-step directory -P 'sh -c \"kill -9 \\\$\\\$\"'"
dies 69 'TLS' 'acme-step directory -P "echo hello"'
dies 69 'the command sh ended the connection' \
    'acme-step directory -P "sh -c \"exec >&- <&-; sleep 9\""'
dies 69 'time limit of 2 s.*' 'acme-step directory -T 2 -P "sleep 299.$$"'
check 'the command is gone with the step' '
    not pgrep -f "^sleep 299[.]$$\$"'
for wrong in '%' '%x' 'a %h %'; do
	dies 64 'accepts only %h, %p and %%' "acme-step directory -P '$wrong'"
done
gone() { not pgrep -f "$1"; }
nap="sleep 300.$$"	# by which it is found
check 'nor does what it started outlive the step' '
    setsid -w acme-step directory -T 1 -P "sh -c \"$nap | cat\"" 2>err
    [ $? = 69 ] && await gone "^$nap$"'

group 'ways to the CA: a command at a terminal'

# at_terminal FILE: the shell runs it on a terminal of its own, where
# somebody types the password.
at_terminal() {
	echo sesame |
	socat -t 30 - "EXEC:sh $1,pty,setsid,ctty,stderr"
}
cat >asking.sh <<'END'
read -r answer </dev/tty && [ "$answer" = sesame ] || exit
exec socat - "TCP:$1:$2"
END
echo 'acme-step directory -T 10 -o asked -P "sh asking.sh %h %p"' >ask.sh
check '-P: the command can ask for a password on the terminal' '
    at_terminal ask.sh; grep "^new-order https://localhost:$pebble/" asked'
cat >noecho.sh <<'END'
stty -echo </dev/tty
trap 'stty echo </dev/tty; exit' TERM
while :; do sleep 0.05; done
END
cat >limit.sh <<END
acme-step directory -T 1 -P 'sh $tmp/noecho.sh'
echo "status \$?"
stty -a | grep -o '[-]*echo '
END
check 'a time limit there: the terminal echoes again' '
    at_terminal limit.sh >typed; cat typed
    grep "time limit of 1 s" typed && grep "status 69" typed &&
    grep "^echo " typed && gone "$tmp/noecho.sh"'
cat >stay.sh <<END
acme-step directory -T 1 -P '$nap'
acme-step directory -P 'sh $tmp/stubborn.sh' &
until [ -e stubborn ]; do sleep 0.1; done
kill \$!
wait \$!
echo "status \$?"
END
cat >stubborn.sh <<'END'
trap '' HUP INT TERM
: >stubborn
while :; do sleep 0.1; done
END
check 'nor does the command outlive the step there' '
    at_terminal stay.sh >typed; cat typed; grep "status 143" typed &&
    gone "^$nap$" && gone "$tmp/stubborn.sh"'

group 'ways to the CA: a proxy'

# proxy [LINE]...: a real one, with more configuration.
proxy_start() {
	proxy=$(free_port)
	{
		printf '%s\n' "Port $proxy" 'Listen 127.0.0.1' 'Timeout 20' \
		    'Allow 127.0.0.1' "ConnectPort $pebble" \
		    "PidFile \"$tmp/proxy.pid\"" "LogFile \"$tmp/proxy.log\""
		printf '%s\n' "$@"
	} >proxy.conf
	server_start tinyproxy -d -c proxy.conf
	up "$proxy"
}
proxy_start
check 'https_proxy' '
    : >proxy.log
    https_proxy=http://127.0.0.1:$proxy/ acme-step directory |
    grep "^new-order https://localhost:$pebble/" &&
    grep "CONNECT localhost:$pebble" proxy.log'
check 'HTTPS_PROXY, without http://, over one connection' '
    : >proxy.log
    HTTPS_PROXY=localhost:$proxy acme-step new-order proxied.test |
    grep "^order " && [ "$(grep -c "Request.*CONNECT" proxy.log)" = 1 ]'
for list in localhost 'a.test, localhost' '*' LOCALHOST \
    'a.test localhost b.test' "localhost:$pebble" \
    "x:1  ,localhost:$pebble,y" "*:$pebble"; do
	check "no_proxy=$list" "
	    https_proxy=http://127.0.0.1:1 no_proxy='$list' acme-step directory"
done
for list in 127.0.0.1 '::1,127.0.0.1' 127.0.0.0/8 '::/0 127.0.0.0/31' \
    127.0.0.1/32 0.0.0.0/0 "127.0.0.1:$pebble"; do
	check "no_proxy=$list" "
	    https_proxy=http://127.0.0.1:1 no_proxy='$list' \
	    acme-step directory -d https://127.0.0.1:$pebble/dir"
done
for list in test .test 'x, .test'; do
	check "no_proxy=$list" "
	    https_proxy=http://127.0.0.1:1 NO_PROXY='$list' \
	    acme-step directory -d https://pebble.test:$pebble/dir \
		-H pebble.test:$pebble:127.0.0.1"
done
for list in 126.0.0.0/8 127.0.0.0/32 127.0.0.0/33 127.0.0.0/ ::/0 /0 \
    ::7f00:1 127.0.0.1:1; do
	dies 69 '127.0.0.1 port 1' "
	    https_proxy=http://127.0.0.1:1 no_proxy='$list' acme-step \
	    directory -d https://127.0.0.1:$pebble/dir"
done
if has_v6; then
	for list in ::/8 '::1/128' '[::1]' '[::1]:1'; do
		dies 69 'connect to ::1 port 1:' "https_proxy=http://[::2]:1 \
		    no_proxy='$list' acme-step directory -T 5 \
		    -d 'https://[::1]:1/dir'"
	done
	for list in fd00::/8 '[::1]:2'; do
		dies 69 'port 3' "https_proxy=http://127.0.0.1:3 \
		    no_proxy='$list' acme-step directory -T 5 \
		    -d 'https://[::1]:1/dir'"
	done
fi
for list in '' host ocalhost localhos .localhost x.localhost localhost:1 \
    "localhost:$pebble/8"; do
	dies 69 '127.0.0.1 port 1' "
	    https_proxy=http://127.0.0.1:1 no_proxy='$list' acme-step directory"
done
check '-P goes before a proxy' '
    https_proxy=http://127.0.0.1:1 acme-step directory \
	-P "socat - TCP:%h:%p"'
dies 69 'refused to connect to localhost:1: HTTP/1.. 403' '
    https_proxy=http://127.0.0.1:$proxy \
    acme-step directory -d https://localhost:1/dir'
proxy_start 'BasicAuth user pAss'
check 'a user and a password, percent-encoded' '
    https_proxy=http://user:p%41ss@127.0.0.1:$proxy acme-step directory'
dies 69 '407' 'https_proxy=http://127.0.0.1:$proxy acme-step directory'
dies 69 '40[17]' '
    https_proxy=http://user:wrong@127.0.0.1:$proxy acme-step directory'
check 'an IPv6 literal' '
    server_start socat "TCP-LISTEN:$proxy,pf=ip6,bind=[::1],fork,reuseaddr" \
	"TCP:127.0.0.1:$proxy"
    await listening "$proxy" && sleep 0.3 &&
    https_proxy="http://user:p%41ss@[::1]:$proxy/" acme-step directory'

group 'ways to the CA: the password of a proxy'

# hushed STATUS CODE...: it exits so, and no output has the password of
# user:sesame, nor that in base64.
hushed() {
	want=$1; shift
	code=$*
	check "exits $want, and shows no password: $(printf %s "$code" |
	    tr -s ' \t\n' ' ')" quiet
}
quiet() {
	(set +x; eval "$code") >out 2>err
	got=$?
	echo "exit status $got"
	cat out err
	[ "$got" = "$want" ] && grep "^acme-step: " err &&
	    not grep -i -e sesame -e c2VzYW1l -e nlc2FtZ -e zZXNhbW out err
}
ear=$(free_port)
server_start socat -u "TCP-LISTEN:$ear,bind=127.0.0.1,fork,reuseaddr" \
    OPEN:heard,creat,append
up "$ear"
for scheme in https HTTPS Https socks4 socks5 socks5h ftp 'h ttp' http:http; do
	hushed 64 "https_proxy='$scheme://user:sesame@127.0.0.1:$ear' \
	    acme-step directory -T 2"
done
check 'nothing was sent' '[ ! -s heard ]'
check 'but HTTP is http' '
    https_proxy=HTTP://user:sesame@127.0.0.1:$ear acme-step directory -T 1 \
	2>err
    [ $? = 69 ] && grep "^Proxy-Authorization: Basic dXNlcjpzZXNhbWU=" heard'
for wrong in http:/user:sesame@127.0.0.1:1 http:user:sesame@ sesame:x \
    http://user:se/same:sesame@127.0.0.1:1 http://127.0.0.1:1/sesame \
    http://user:sesame http://user:sesame@ 'http://sesame a' \
    http://user:sesame@a:99999 http://user:sesame@a:0; do
	hushed 64 "https_proxy='$wrong' acme-step directory"
done
for wrong in https://127.0.0.1:1 http:// http://a:b; do
	dies 64 'https_proxy must be http://' \
	    "https_proxy='$wrong' acme-step directory"
	dies 64 'https_proxy must be http://' \
	    "HTTPS_PROXY='$wrong' acme-step new-order proxied.test"
done
echo 'echo "$@" >>published' >note.sh && chmod +x note.sh
check 'it is refused before anything is published' '
    acme-step new-order proxied.test | acme-step challenges -o unasked &&
    https_proxy=https://127.0.0.1:1 acme-step respond -t http-01 \
	-x ./note.sh <unasked
    [ $? = 64 ] && [ ! -e published ]'
check 'one that is not used does not matter' '
    export https_proxy=https://127.0.0.1:1
    acme-step version && acme-step thumbprint &&
    acme-step directory -P "socat - TCP:%h:%p" &&
    no_proxy="*" acme-step directory && no_proxy=LOCALHOST acme-step account
    acme-step directory -B unused; [ $? = 75 ] &&
    no_proxy=localhost acme-step send unused && acme-step send unused'
hushed 64 'rm -f unused/1.response
    https_proxy=https://user:sesame@127.0.0.1:$ear acme-step send unused'
hushed 69 'https_proxy=http://user:sesame@127.0.0.1:1 acme-step directory'
hushed 69 'https_proxy=http://user:a@sesame@127.0.0.1:1 acme-step directory'
hushed 69 'https_proxy=http://user:@sesame@nowhere.invalid acme-step directory'
hushed 69 'https_proxy=http://sesame@127.0.0.1:$proxy acme-step directory -v'
hushed 69 'https_proxy=user:sesame@127.0.0.1:$proxy acme-step directory -v'
hushed 143 'https_proxy=http://user:sesame@127.0.0.1:$ear \
    timeout --preserve-status 1 acme-step directory'
hushed 69 'acme-step directory -P "false sesame"'
hushed 69 'acme-step directory -P "  true	sesame"'
hushed 69 'ACME_PROXY_COMMAND="sh -c \"sleep 9; : sesame\"" \
    acme-step directory -T 1'
hushed 65 'ACME_EAB_HMAC_KEY=sesame acme-step new-account -y'
hushed 65 'ACME_EAB_KID=kid ACME_EAB_HMAC_KEY="se same!" \
    acme-step new-account -y'
hushed 65 'echo "kid sesame sesame" >bound; acme-step new-account -y -e bound'
check 'a password that has an @' '
    https_proxy=http://user:p@ss:w@127.0.0.1:$ear acme-step directory -T 1 \
	2>err
    [ $? = 69 ] && grep " Basic dXNlcjpwQHNzOnc=" heard'

group 'ways to the CA: what a proxy answers'

# answers CODE: what a proxy says is the shell's CODE.
answers() {
	echo "$1" >proxy.sh
	proxy=$(free_port)
	cp proxy.sh "proxy.$proxy"
	server_start socat "TCP-LISTEN:$proxy,bind=127.0.0.1,fork,reuseaddr" \
	    "EXEC:sh proxy.$proxy"
	up "$proxy"
}
by_proxy() { https_proxy=http://127.0.0.1:$proxy acme-step directory "$@"; }
answers 'read -r x; echo SSH-2.0-x'
dies 69 'SSH-2.0-x' by_proxy
for answer in 'HTTP/1.1 407 not sesame' sesame 'HTTP/1.1 sesame'; do
	answers "read -r x; echo '$answer'"
	hushed 69 'https_proxy=http://user:sesame@127.0.0.1:$proxy \
	    acme-step directory'
done
answers 'read -r x; printf "HTTP/1.1 502 \033[31mno\r\n\r\n"'
dies 69 '502 ?\[31mno' by_proxy
answers 'read -r x; echo "HTTP/1.1 200 OK"'
dies 69 'no valid response' by_proxy
answers "cr=\$(printf '\\r'); while read -r x && [ \"\$x\" != \"\$cr\" ]; do
    :; done; printf 'HTTP/1.1 100 Continue\\r\\n\\r\\n'
    printf 'HTTP/1.1 102 Wait\\r\\nA: b\\r\\n\\r\\n'
    printf 'HTTP/1.1 200 OK\\r\\n\\r\\n'; exec socat - TCP:127.0.0.1:$pebble"
check 'interim answers before that of the proxy' 'by_proxy | grep ^new-order'
answers 'yes "HTTP/1.1 200 OK"'
dies 69 'no valid response' by_proxy
answers 'head -c 100000 /dev/zero | tr "\0" x'
dies 69 'no valid response' by_proxy
answers 'cat >/dev/null'
dies 69 'time limit of 2 s' 'by_proxy -T 2'

group 'the air gap'
# isolated COMMAND...: where there is no network at all.
isolated() {
	own=-rn
	[ "$(id -u)" != 0 ] || own=-n
	unshare $own "$@"
}
unset ACME_ACCOUNT
check 'there is no network there' '
    not isolated acme-step directory -T 2'
pebble_stop
pebble_start PEBBLE_WFE_NONCEREJECT=50
mkdir gap && cp one.key.pem gap/key.pem
cat >gap/issue <<'END'
acme-step new-account -B box.account -y -o account >/dev/null &&
acme-step new-order -B box.order -a account gap.test gap2.test |
acme-step respond -B box.respond -t http-01 -w "$www" |
acme-step finalize -B box.finalize -K key.pem -o chain.pem
END
check 'a courier of three lines' '
    cd gap
    acme-step key -o account.pem; ACME_KEY=account.pem; export www
    rounds=0
    until isolated sh issue 2>err; do
	[ $? = 75 ] && grep "acme-step send" err || exit
	for box in box.*; do acme-step send "$box" || exit; done
	[ $((rounds += 1)) -lt 60 ] || exit
    done
    echo "$rounds rounds" && cd .. &&
    issued one.key.pem gap/chain.pem DNS:gap.test DNS:gap2.test'
check 'what was published is taken down at the end' '[ -z "$(ls "$www")" ]'
check 'run again, it finds all replies' '
    cd gap; ACME_KEY=account.pem; export www
    mv chain.pem chain0.pem && isolated sh issue && cmp chain0.pem chain.pem'
check 'send with nothing to do' '
    for box in gap/box.*; do acme-step send -d https://localhost:1/ "$box" ||
	exit; done'
check 'a request can be read: the message, and what it says' '
    set -- $(grep -l "^POST https://localhost:$pebble/[^ ]* HTTP/1.1" \
	gap/box.order/*.request) && cat "$1" &&
    grep "^# protected: {\"alg\":\"ES256\",\"kid\":\"https:" "$1" &&
    grep "^# payload: {\"identifiers\":\[{\"type\":\"dns\"" "$1"'
check 'a key was never in a box' '
    not grep -rl -e "PRIVATE KEY" gap/box.*'
order_in() { isolated acme-step new-order -B "$1" -a gap/account \
    -k gap/account.pem gap.test gap2.test; }
check 'an order in a new box' '
    order_in gap/o 2>err; [ $? = 75 ] && acme-step send gap/o &&
    until order_in gap/o >gap/record 2>err; do
	acme-step send gap/o || exit
    done
    grep "^order " gap/record'
respond_again() { isolated acme-step respond -B gap/r -k gap/account.pem \
    -t http-01 -w "$www" <gap/record; }
check 'requests of a batch are written together' '
    until respond_again 2>err; [ "$(ls gap/r | grep -c request)" -gt 2 ]; do
	acme-step send gap/r || exit
    done; cat err; ls gap/r
    grep "^acme-step: respond: gap/r has 2 requests without a resp" err &&
    [ -e gap/r/3.request ] && [ -e gap/r/2.request ]'
cp -r gap/o gap/kept
# spoil CODE...: the box after that is refused; the good one still works.
spoil() {
	rm -rf gap/o && cp -r gap/kept gap/o
	dies 65 'gap/o' "(cd gap/o; $*); order_in gap/o"
	check 'nothing is lost' 'rm -rf gap/o && cp -r gap/kept gap/o
	    order_in gap/o | diff - gap/record'
}
spoil 'cp 1.response x; mv 2.response 1.response; mv x 2.response'
spoil 'head -c 100 2.response >x; mv x 2.response'
spoil 'sed -i s/200/201/ 1.response'
spoil 'sed -i s/Nonce/nonce/ 1.response'
spoil ': >1.response'
spoil 'head -c 300000 /dev/zero >1.response'
spoil 'echo >>1.response'
spoil 'sed -i s/a/b/ 1.request'
dies 65 'another step' '
    isolated acme-step new-order -B gap/o -k gap/account.pem other.test'
dies 66 'gap/none' 'acme-step send gap/none'
dies 65 '1.request.*not a request' '
    mkdir gap/bad && echo nonsense >gap/bad/1.request
    acme-step send gap/bad'
dies 65 '1.request.*not a request' '
    printf "GET http://localhost/ HTTP/1.1\r\n\r\n" >gap/bad/1.request
    acme-step send gap/bad'
dies 73 'one.pem/box' 'acme-step directory -B one.pem/box'
dies 64 'cannot be used with -B' \
    'isolated acme-step respond -B gap/l -t http-01 -l 8080 \
    -k gap/account.pem <gap/record'
check 'ACME_BOX; commands without network take no notice' '
    ACME_BOX=gap/e isolated acme-step thumbprint -k gap/account.pem &&
    [ ! -e gap/e ] && ACME_BOX=gap/e isolated acme-step directory 2>err
    [ $? = 75 ] && [ -s gap/e/1.request ] &&
    ACME_BOX=gap/e acme-step send gap/e && [ -s gap/e/1.response ]'
dies 69 'localhost' '
    ACME_BOX=gap/f acme-step directory -d https://localhost:1/ 2>/dev/null
    acme-step send gap/f'
pebble_stop
pebble_start

group 'authorizations that are valid already'
pebble_stop
pebble_start PEBBLE_AUTHZREUSE=100
unset ACME_ACCOUNT
check 'the first order' '
    acme-step new-account -y >/dev/null &&
    acme-step new-order reuse.test |
    acme-step respond -t http-01 -w "$www" |
    acme-step finalize -K one.key.pem -o first.pem &&
    issued one.key.pem first.pem DNS:reuse.test'
check 'the challenges step has nothing to do' '
    acme-step new-order -o ready reuse.test &&
    grep -x "status ready" ready &&
    acme-step challenges <ready | not grep "^challenge"'
check 'nor has respond' '
    acme-step respond -t http-01 -w elsewhere <ready | grep -x "status ready"'
check 'no middle step' '
    acme-step new-order reuse.test |
    acme-step finalize -K one.key.pem -o second.pem &&
    issued one.key.pem second.pem DNS:reuse.test &&
    ! cmp -s first.pem second.pem'
pebble_stop
dies 69 'localhost.*refused' 'acme-step directory'
dies 69 'nowhere.invalid' 'acme-step directory -d https://nowhere.invalid/'

group 'the README works'
pebble_start
check 'its pipeline, as it stands' '
    mkdir readme && cd readme && unset ACME_KEY ACME_ACCOUNT &&
    (cd .. && quick_start) >quick && [ -s quick ] && cat quick &&
    sh -e quick && cp ../root.pem . &&
    openssl verify -CAfile root.pem -untrusted fullchain.pem fullchain.pem &&
    issued example.pem fullchain.pem DNS:example.com DNS:www.example.com'

# section TITLE: that part of the README, without its indentation.
section() {
	awk -v title="$1" '/^[^ \t]/ { inside = $0 == title; next }
	    inside && NF { sub(/^[ \t]+/, ""); print }' "$src/README"
}
# block TITLE START: the lines below that title from START to an empty one.
block() {
	awk -v title="  $1" -v start="$2" '$0 == title { inside = 1; next }
	    /^  [^ ]/ || !NF { if (lines) exit }
	    inside && index($0, "    " start) == 1 { lines = 1 }
	    lines { sub(/^    /, ""); print }' "$src/README"
}
# The test directory is Pebble by its address, the real one by its name.
check 'from the test directory to the real one' '
    unset ACME_KEY ACME_ACCOUNT ACME_DIRECTORY
    mkdir real && cd real && cp ../root.pem . &&
    (cd .. && quick_start) >quick &&
    section "TRYING IT" | grep -A 1 ^staging= >staging &&
    section "TRYING IT" | grep "^rm " >remove && cat staging remove &&
    grep -x "staging=https://[a-z0-9.-]*/directory" staging &&
    sed -i "1s|=.*|=https://127.0.0.1:$pebble/dir|" staging &&
    { sed -n 1,2p quick; cat staging; sed 1,3d quick; } >test &&
    sh -e test && cp example.pem old.pem && cp fullchain.pem test.pem &&
    [ "$(field directory account)" = "https://127.0.0.1:$pebble/dir" ] &&
    acme-step due -K example.pem fullchain.pem example.com www.example.com
    [ $? = 1 ] && sh -e remove &&
    ACME_DIRECTORY=https://localhost:$pebble/dir && export ACME_DIRECTORY &&
    sed 2d quick >again && sh -e again && cmp example.pem old.pem &&
    [ "$(field directory account)" = "$ACME_DIRECTORY" ] &&
    not cmp test.pem fullchain.pem &&
    issued example.pem fullchain.pem DNS:example.com DNS:www.example.com'
check 'the account key is lost' '
    unset ACME_KEY ACME_ACCOUNT; cd real && cp account old.account &&
    acme-step key -o other.pem && mv other.pem account.pem &&
    not acme-step new-order -a account lost.test &&
    block "Lost files" "rm " >lost && cat lost && sh -e lost &&
    not cmp account old.account &&
    acme-step new-order -a account lost.test | grep "^order https://"'
check 'the account record is lost' '
    unset ACME_KEY ACME_ACCOUNT; cd real && mv account old.account &&
    acme-step new-account -y -o account &&
    [ "$(field account account)" = "$(field account old.account)" ]'

group 'the README works: its scripts'

# example TITLE: the script below that title, with the paths of here.
example() {
	block "$1" '#!' |
	sed -e "s|/data|$PWD|" -e "s|/var/www/acme|$www|" \
	    -e "s|-l 80|-l 127.0.0.1:$web|" -e 's|sleep 20000|sleep 2|' \
	    -e 's|respond -c -s 60|respond -s 2|'
}
# What is at port 80 is started by the container.
pebble_stop
web=$(free_port)
pebble_start
unset ACME_KEY ACME_ACCOUNT
cat >webserver.sh <<END
trap 'echo reloaded >>reloads' HUP
trap 'kill \$!; exit' TERM
echo started >>starts
busybox httpd -f -p 127.0.0.1:$web -h "$tmp/www" &
while kill -0 \$!; do
	sleep 0.2
done
END
mkdir container
cd container || exit
example 'A container: port 80 is free at start, then a server runs' >entry
setsid sh entry sh ../webserver.sh >container.log 2>&1 &
container=$!
pids="$pids $container"
check 'a container has a certificate before its server starts' '
    await test -s starts; cat container.log; cp ../root.pem ../ca.pem . &&
    issued example.pem fullchain.pem DNS:example.com DNS:www.example.com &&
    [ ! -e reloads ]'
check 'and another when the CA suggests it, while its server runs' '
    cp fullchain.pem first.pem && cp fullchain.pem ari.pem &&
    window 2026-01-01T00:00:00Z 2026-01-02T00:00:00Z &&
    await test -s reloads; cat container.log
    issued example.pem fullchain.pem DNS:example.com DNS:www.example.com &&
    kill -0 "$container" && not cmp first.pem fullchain.pem &&
    is 1 "grep -c reloaded reloads"'
kill -- "-$container"
wait "$container"
pids=${pids% *}
# again: the container starts, and ends.
restart() { setsid -w sh entry sh -c 'kill -- -$$'; [ $? = 143 ]; }
check 'it does not issue at the next start' '
    cp fullchain.pem old.pem && restart && cmp old.pem fullchain.pem'
check 'if the account key is lost, key and account are made together' '
    mv account.pem old.account.pem && cp account old.account && restart &&
    acme-step new-order -a account lost.test | grep "^order https://" &&
    not cmp old.account account'
check 'a CA that cannot be reached ends it with that status' '
    rm account; ACME_DIRECTORY=https://localhost:1/
    export ACME_DIRECTORY; sh entry true; [ $? = 69 ]'
cd "$tmp" || exit

mkdir zone
cd zone || exit
acme-step key -o account.pem
acme-step key -o example.pem
acme-step new-account -y -o account
# nsupdate: what it is told goes to Pebble's DNS.
cat >../bin/nsupdate <<END
#!/bin/sh
while read -r word what name ttl type value; do
	[ "\$word" = update ] || continue
	echo "\$what \$name" >>"$tmp/zone/updates"
	case \$what in
	add)	what=set json=",\"value\":\$value" ;;
	delete)	what=clear json= ;;
	esac
	curl -sS -d "{\"host\":\"\$name\"\$json}" \
	    "http://127.0.0.1:$dns_control/\$what-txt"
done
END
chmod +x ../bin/nsupdate
example 'A wildcard, with dns-01 and nsupdate' >script
echo 'add _acme-challenge.example.org.
add _acme-challenge.example.org.
delete _acme-challenge.example.org.
delete _acme-challenge.example.org.' >wanted
check 'a wildcard by nsupdate' '
    dash script && cp ../root.pem . && diff wanted updates &&
    issued example.pem fullchain.pem "DNS:*.example.org" DNS:example.org'
check 'SIGTERM removes the records, too' '
    rm updates; dash script & script=$!
    await test -s updates; sleep 0.5; kill "$script"; wait "$script"
    [ $? = 1 ] && diff wanted updates'
cd "$tmp" || exit
rm bin/nsupdate

group 'the README works: further examples'
mkdir further
cd further || exit
for key in account key example; do
	acme-step key -o $key.pem
done
acme-step new-account -y -o account
check 'a health check' '
    block "Renew from cron" "acme-step due" >script && cat script &&
    acme-step new-order -a account example.com | acme-step respond \
	-t http-01 -l "127.0.0.1:$web" |
    acme-step finalize -K example.pem -o fullchain.pem && sh script &&
    mv fullchain.pem first.pem && not sh script'
check 'the units of systemd' '
    block "Renew from a systemd timer" "[Unit]" |
    sed "s|/usr/local/sbin/renew|/bin/true|" >acme.service &&
    block "Renew from a systemd timer" "[Timer]" >acme.timer &&
    cat acme.service acme.timer && with_servers systemd-analyze verify \
	./acme.service ./acme.timer 2>&1 | tee said; ! [ -s said ] &&
    with_servers systemd-analyze calendar "$(sed -n \
	"s/OnCalendar=//p" acme.timer)"'
# script_of FILTER: what the container of the CronJob runs, in this directory.
script_of() {
	block 'Renew from a Kubernetes CronJob' 'apiVersion:' >job.yaml &&
	python3 -c '
import sys, yaml
job = yaml.safe_load(open("job.yaml"))
assert job["kind"] == "CronJob" and job["apiVersion"] == "batch/v1"
pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
(c,) = pod["containers"]
assert c["command"] == ["sh", "-ec"] and c["workingDir"] == "/data"
assert c["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
sys.stdout.write(c["args"][0])' | sed "$1"
}
cat >../bin/kubectl <<END
#!/bin/sh
case \$1 in apply) exec cat >applied ;; esac
PATH=\${PATH#*:}
. ../kubectl.path
exec kubectl "\$@"
END
with_servers sh -c 'echo "PATH=$PATH LD_LIBRARY_PATH=$LD_LIBRARY_PATH" \
    >../kubectl.path'
sed -i "s|PATH=$tmp/bin:|PATH=|" ../kubectl.path
chmod +x ../bin/kubectl
check 'a CronJob of Kubernetes, and its secret' '
    script_of "s|-l 8080 -s 30|-l 127.0.0.1:$web|" >script && cat script &&
    sh -e script && python3 -c "
import base64, yaml
secret = yaml.safe_load(open(\"applied\"))
assert secret[\"kind\"] == \"Secret\" and secret[\"type\"] == \\
    \"kubernetes.io/tls\", secret
for name, file in (\"tls.crt\", \"chain.pem\"), (\"tls.key\", \"key.pem\"):
    data = base64.b64decode(secret[\"data\"][name])
    assert data == open(file, \"rb\").read()
" && cp ../root.pem . && issued key.pem chain.pem DNS:example.com'
check 'it issues only what is due' '
    cp chain.pem old.pem && rm applied && sh -e script &&
    cmp old.pem chain.pem &&
    [ -s applied ] && echo x >key.pem && not sh -e script'
front=$(free_port)
sed -e "s/bind .*/bind 127.0.0.1:$web/" -e "s/1:[0-9]* send/1:$front send/" \
    ../hostile/haproxy-v2.conf >haproxy.conf
check 'pods behind a balancer with the PROXY protocol' '
    rm -f key.pem chain.pem && acme-step key -o key.pem &&
    grep -qF "use -l proxy:8080" "$src/README" &&
    script_of "s|-l 8080 -s 30|-l proxy:127.0.0.1:$front|" >script && {
    be_server haproxy -db -f haproxy.conf & balancer=$!
    await listening $web; sh -e script; status=$?
    kill $balancer; wait $balancer; [ $status = 0 ] &&
    issued key.pem chain.pem DNS:example.com; }'
server_start busybox httpd -f -p "127.0.0.1:$web" -h "$tmp/www"
up "$web"
# from_etc: the script of standard input, with the paths of here.
from_etc() { sed -e "s|/etc/acme|$PWD|g" -e "s|/var/www/acme|$www|"; }
check 'the second CA, when the first is down' '
    unset ACME_DIRECTORY
    block "Two CAs, the second one when the first is down" "#!" |
    from_etc >script && cat script && cp account account2 &&
    sed "s|localhost:$pebble|localhost:1|" account2 >account && sh script &&
    cp ../root.pem . && issued example.pem fullchain.pem DNS:example.com
    status=$?; cp account2 account; exit $status'
check 'not when it refuses' '
    unset ACME_DIRECTORY
    rm fullchain.pem && sed -i "s/ example.com/ blocked.test/" script &&
    echo >account2; sh script; [ $? = 77 ] && [ ! -e fullchain.pem ]'
check 'the names that do not fail' '
    rm -f order authz ready && curl -sS --fail \
	-d "{\"host\":\"old.example.com\",\"addresses\":[\"127.0.0.9\"]}" \
	"http://127.0.0.1:$dns_control/add-a" &&
    block "Go on without the names that fail" "#!" | from_etc >script &&
    cat script && sh script && cp ../root.pem . &&
    issued example.pem fullchain.pem DNS:example.com DNS:www.example.com'
check 'and an end if none is left' '
    rm fullchain.pem; sed -i "s/^set -- .*com/set -- old.example.com/" script &&
    sh script; [ $? = 77 ] && [ ! -e fullchain.pem ] &&
    sed -i "s/^set -- .*com/set -- blocked.test/" script &&
    sh script; [ $? = 77 ]'
check 'for haproxy, and PKCS #12' '
    cp first.pem fullchain.pem && echo secret >password &&
    block "Other forms of the result" "(umask" >script && cat script &&
    sh -e script && printf "%s\n" "frontend x" "mode http" \
	"timeout client 1s" "bind 127.0.0.1:1 ssl crt haproxy.pem" \
	>check.conf &&
    with_servers haproxy -c -f check.conf &&
    [ "$(stat -c %a haproxy.pem)" = 600 ] &&
    openssl pkcs12 -in example.p12 -passin file:password -nokeys >p12 &&
    openssl x509 -in p12 -noout -pubkey >a &&
    openssl pkey -in example.pem -pubout | diff a - &&
    openssl pkcs12 -in example.p12 -passin file:password -nodes -nocerts |
    openssl pkey -pubout | diff a -'
nginx_port=$(free_port)
caddy_port=$(free_port)
check 'nginx with a certificate of the private CA' '
    cp first.pem fullchain.pem && mkdir scratch && {
    printf "%s\n" "daemon off; pid scratch/pid; error_log scratch/log;" \
	"events { } http { access_log off;"
    for kind in client_body proxy fastcgi uwsgi scgi; do
	echo "${kind}_temp_path scratch;"
    done
    echo "server { listen 127.0.0.1:$nginx_port ssl;"
    block "A private CA" ssl_certificate | from_etc
    echo "return 200 hello; } }"; } >nginx.conf && cat nginx.conf &&
    { be_server nginx -p "$PWD/" -e scratch/log -c nginx.conf &
    await listening $nginx_port
    is hello "curl -sS --cacert ../root.pem --resolve \
	example.com:$nginx_port:127.0.0.1 https://example.com:$nginx_port/"
    status=$?; kill "$(cat scratch/pid)"; exit $status; }'
check 'Caddy, too' '
    { printf "%s\n" "{" admin\ off auto_https\ disable_redirects "}"
    block "A private CA" "example.com {" | from_etc |
    sed -e "s/^example.com/https:\/\/example.com:$caddy_port/" \
	-e "s/^}/respond hello\n}/"; } >Caddyfile && cat Caddyfile &&
    export HOME=$PWD XDG_DATA_HOME=$PWD; {
    be_server caddy run --config Caddyfile --adapter caddyfile \
	>caddy.log 2>&1 & caddy=$!
    await listening $caddy_port; cat caddy.log
    is hello "curl -sS --cacert ../root.pem --resolve \
	example.com:$caddy_port:127.0.0.1 https://example.com:$caddy_port/"
    status=$?; kill $caddy; wait $caddy; exit $status; }'
socks=$(free_port)
be_server microsocks -i 127.0.0.1 -p "$socks" >>../servers.log 2>&1 &
socks_server=$!
pids="$pids $socks_server"
check 'a SOCKS proxy' '
    await listening $socks && ln -sf /bin/nc.openbsd ../bin/nc || exit
    grep -o "export ACME_PROXY_COMMAND=.nc .*" "$src/README" |
    sed "s/1080/$socks/" >script && cat script && [ -s script ] && . ./script &&
    acme-step directory >d && grep new-order d &&
    kill -STOP $socks_server && {
    acme-step directory -T 2; status=$?; kill -CONT $socks_server
    [ $status = 69 ]; }'
rm -f ../bin/nc ../bin/kubectl
cd "$tmp" || exit
pebble_stop

group 'the README agrees with acme.c'

check 'the contents of the README are its sections' '
    awk "/^[A-Z]/ && !/^(NAME|QUICK START|CONTENTS)\$/" "$src/README" >a &&
    [ -s a ] && section CONTENTS | awk "{ sub(/  .*/, \"\")
	for (n = split(\$0, title, \", \"); i < n; ) print title[++i]
	i = 0 }" | diff a -'
check 'the exit statuses are those of the code' '
    sed -n "/^enum.*exit statuses/,/^}/s/^[ \t]*[A-Z_]* *= \([0-9]*\),.*/\1/p" \
	"$src/acme.c" | sort -u >a && [ "$(grep -c . a)" = 13 ] &&
    section "EXIT STATUS" | sed -n "s/^\([0-9][0-9]*\)  .*/\1/p" |
    sort -u | diff a -'
check 'the common options and their variables are those of OPTIONS' '
    acme-step help new-order | sed -n "/^common options:/,\$p" >help &&
    sed -n "s/^  \(-.\) .*/\1/p" help | sort >a && [ -s a ] &&
    section OPTIONS | sed -n "s/^\(-[A-Za-z0-9]\)  .*/\1/p" | sort -u |
    diff a - && grep -o "ACME_[A-Z_]*" help | sort >a && [ -s a ] &&
    section OPTIONS | grep -o "ACME_[A-Z_]*" | sort -u | diff a -'
check 'STANDARDS names the documents that acme.c follows' '
    sed "s/^ \* *//" "$src/acme.c" | tr "\n" " " |
    grep -oE "RFCs? [0-9]+(, [0-9]+)*" | grep -oE "[0-9]+" | sort -u >a &&
    [ "$(grep -c . a)" -gt 30 ] &&
    section STANDARDS | sed "/X\.690/q" | grep -oE "\<[0-9]{4}\>" |
    grep -v 2008 | sort -u | diff a - &&
    grep -q "X\.690" "$src/acme.c" && grep -q "POSIX" "$src/acme.c"'
# The facts of LIMITS and SECURITY: what acme.c says of each number there.
cat >facts.c <<'END'
#define main acme_main
#include "acme.c"
#undef main
#define FACT(...) (printf(__VA_ARGS__), putchar('\n'))
int
main(void)
{
	FACT("names in an order %d", NAMES);
	FACT("challenges in a record %d", CHALLENGES);
	FACT("contact lines in a record %d", LISTED);
	FACT("origin lines in a record %d", ORIGINS);
	FACT("lines of unknown keywords %d", OTHERS);
	FACT("contacts (-m) %d", CONTACTS);
	FACT("certificates in a chain %d", CERTS);
	FACT("depth of nested JSON %d", DEPTH);
	FACT("requests at once %d", WINDOW);
	FACT("nonces at once %d", NONCES);
	FACT("tries after server errors %d", TRIES);
	FACT("pages of account orders %d", PAGES);
	FACT("addresses of -H %d", RESOLVED);
	FACT("addresses tried at once %d", ATTEMPTS);
	FACT("requests sent again %d", RESENDS);
	FACT("peers of respond -l %d", CLIENTS);
	FACT("anchors named in a chain %d", ANCHORS);
	FACT("addresses of each family %d", ADDRESSES);
	FACT("looks (-c) at once %d", LOOKS);
	FACT("a look at a challenge %d seconds", LOOK);
	FACT("places that a look visits %d", PLACES);
	FACT("connecting to a place %d seconds", REACH);
	FACT("redirects of a look %d", REDIRECTS);
	FACT("tries of a UDP query %d", ASKED);
	FACT("aliases and delegations %d", ALIASES);
	FACT("a look's report %d bytes", REPORT);
	FACT("make respond exit %d and", LATER);
	FACT("a message %d bytes", MESSAGE);
	FACT("a list in a message %d bytes", LIST);
	FACT("a host name %d bytes", HOSTNAME);
	FACT("memory of a step %d MiB", HEAP >> 20);
	FACT("a response's header %d KiB", HEAD >> 10);
	FACT("a response's body %d KiB", BODY >> 10);
	FACT("a peer's request %d bytes", REQUEST);
	FACT("a peer of respond -l %d seconds", PATIENCE);
	FACT("connecting to one address %d seconds", CONNECT);
	FACT("-T and -s %d days", MAX_WAIT / 86400);
	FACT("a certbot hook's output %d bytes", HOOK_SAYS);
	FACT("a TLS certificate %d KiB", CERT >> 10);
	FACT("a common name (-N) %d characters", COMMON);
	FACT("a challenge's token %d characters", TOKEN);
	FACT("a field of a record, a URL %d bytes", WORD);
	FACT("pause if accepting fails %d ms", RETRY);
	FACT("a hook's environment %d variables", HOOK_ENV);
	FACT("a file or standard input %d KiB", INPUT >> 10);
	FACT("a nonce %d characters", NONCE);
	FACT("a DNS response over UDP %d bytes with EDNS, else %d, and at "
	    "most %d times its query", DATAGRAM, PLAIN, FACTOR);
	FACT("hooks that clean up %d seconds", GRACE);
	FACT("writing the last messages %d seconds", LAST_WORDS);
	FACT("-P's command, on a terminal %d ms to end when its input ends, "
	    "%d ms after SIGTERM", ENDING, ENDING);
	FACT("Keys are P-256, P-384, or RSA of %d to %d bits",
	    MIN_MODULUS * 8, MAX_MODULUS * 8);
	FACT("RSA keys of %d to %d bits", MIN_MODULUS * 8, MAX_MODULUS * 8);
	FACT("Only version 1.%d", BR_TLS12 - BR_TLS10);
	FACT("SHA-256 to SHA-%d", br_sha512_SIZE * 8);
	FACT("the step exits %d before it signs", BROKEN);
	FACT("key-change and deactivate-authz exit %d", BROKEN);
	FACT("all other descriptors (below %d)", FILES);
	FACT("user and group %d (nobody)", NOBODY);
	FACT("without user %d ", NOBODY);
	FACT("the step exits %d at once", FAULT);
	return 0;
}
END
# facts_left: what is left of LIMITS and SECURITY without the facts, and
# without the names of algorithms, files and standards that hold digits.
facts_left() {
	{ section LIMITS; section SECURITY; } | tr -s " \n" " " >words
	while IFS= read -r fact; do
		grep -qF -- "$fact" words || echo "no: $fact"
		awk -v fact="$fact" '{ while (i = index($0, fact))
		    $0 = substr($0, 1, i - 1) substr($0, i + length(fact))
		    print }' words >words.new && mv words.new words
	done <facts
	sed 's/All memory is static:.* less than 1 MiB\.//
	    s/P-[235][0-9]*//g; s/[EHR]S[235][0-9]*//g; s/SHA-[0-9]*//g
	    s/X25519//; s/Poly1305//; s/ChaCha20//; s/PKCS #1 v1.5//
	    s/X[12]//g; s/tls-alpn-01//g; s/dns-persist-01//g; s/base64url//g
	    s/UTF-8//g; s/demands 1\.3//; s/version 3,//
	    s/core files to 0//' words | grep -o '.\{30\}[0-9].\{0,30\}'
}
check 'the numbers of LIMITS and SECURITY are those of acme.c' '
    ${CC:-cc} -w -I"$src" facts.c -o facts.bin -lbearssl &&
    ./facts.bin >facts && [ "$(grep -c . facts)" -gt 50 ] &&
    facts_left >left; cat left; [ ! -s left ]'
# Those that are not there show in messages, or not at all.
check 'no limit of acme.c is missing in LIMITS' '
    sed -n "/^ \* Limits\./,/^};/s/^	\([A-Z_0-9]*\) *= .*/\1/p" \
	"$src/acme.c" >a &&
    [ "$(grep -c . a)" -gt 40 ] && while read -r limit; do
	grep -qw "$limit" facts.c || echo "$limit"
    done <a >b; printf "%s\n" SLOTS PORT MAX_PORT REFUSALS LAG REMEDY DETAIL \
	BRIEF EARLY IDLE HEAD_START LATE_IPV6 RESIDUE | diff - b'
check 'it runs the image of this version' '
    grep "^ *acme-step:$(defined VERSION) key" "$src/README"'
check 'the README has at most 1250 lines' '
    awk "END { print NR; exit NR > 1250 }" "$src/README"'
case $acme in
*-san|*-cov) ;;		# its sanitizers bring their own
*)
	check 'memory is static, and as much as the README says' '
    memory=$(size -A "$acme" | awk "/^\.(bss|data)/ { n += \$2 }
	END { printf \"%.1f\", n / 1048576 }")
    grep -q "All memory is static: $memory MiB," "$src/README" ||
	{ echo "$memory"; exit 1; }'
	;;
esac
# The synopsis of a command is its heading, which may end with a standard.
check 'the headings of COMMANDS are the synopses of help' '
    awk "/^[^ \t]/ { inside = \$0 == \"COMMANDS\" }
	inside && blank && /^    [a-z]/ { sub(/  *\[RFC .*/, \"\"); print }
	{ blank = !NF }" "$src/README" | sed "s/^ */acme-step /" | sort >a &&
    [ -s a ] && synopses | diff a -'
group 'the tree agrees with itself'

check 'make install and uninstall' '
    cd "$src" && unset MAKEFLAGS &&
    make PREFIX=/usr DESTDIR="$tmp/inst" install &&
    cmp acme-step "$tmp/inst/usr/bin/acme-step" &&
    make PREFIX=/usr DESTDIR="$tmp/inst" uninstall &&
    find "$tmp/inst" -type f | not grep .'
check 'acme.c is compiled with -fstack-protector-strong' '
    mkdir guarded && cp "$src/acme.c" "$src/Makefile" guarded &&
    cd guarded && unset MAKEFLAGS && make CC="musl-gcc -save-temps" &&
    guards=$(cat ./*.s | grep -c __stack_chk_fail) && echo "$guards" &&
    [ "$guards" -gt 60 ]	# -fstack-protector alone: 14'
check 'BearSSL is found by a compiler that knows no multiarch, such as clang' '
    mkdir other && cp "$src/acme.c" "$src/Makefile" other && cd other &&
    unset MAKEFLAGS && printf "%s\n" "#!/bin/sh" "case \$* in" \
	"*-print-multiarch*) exit 1 ;; esac; exec cc \"\$@\"" >compiler &&
    chmod +x compiler && make CC=./compiler LDFLAGS= >log 2>&1; got=$?
    cat log; [ $got = 0 ] && not grep warning log && ./acme-step help key'
check 'the contents of acme.c are its sections' '
    sed -n "s/^\/\* -* \([0-9]*\. .*\) -- \*\//\1/p" "$src/acme.c" |
    sort >a && [ "$(grep -c . a)" -gt 20 ] &&
    sed -n "/^ \* Contents:/,/^ \*$/p" "$src/acme.c" |
    grep -o "[0-9][0-9]*\. [A-Z][A-Za-z -]*" | sed "s/ *$//" | sort |
    diff a -'
check 'each quirk of real CAs has its test' '
    for i in $(seq 28); do
	grep -q "quirk $i:" "$src/test.sh" || { echo "no quirk $i"; exit 1; }
    done'
check 'no line is over 80 columns' '
    cd "$src" && for file in acme.c Makefile test.sh README; do
	expand "$file" | not grep -n ".\{81\}" || exit
    done'
check 'no section of acme.c is over 450 lines' '
    awk "/^\/\* -.* -- \*\/$/ { name = \$0; first = NR }
	name && NR - first >= 450 { print name; name = \"\"; bad = 1 }
	END { exit bad || !first }" "$src/acme.c"'
check 'no function of acme.c is over 50 lines' '
    awk "/^{$/ { first = NR }
	/^}$/ && NR - first > 51 { print NR; bad = 1 }
	END { exit bad || !first }" "$src/acme.c"'
check 'in no template two gaps stand side by side' '
    not grep -n "\"[^\"]*%%[^\"]*\"" "$src/acme.c"'
# tags KINDS: of acme.c; f and d are functions and macros, l and z locals.
tags() {
	ctags -x --c-kinds="$1" "$src/acme.c" | awk '{ print $1 }' | sort -u
}
check 'no local of acme.c hides a function or a macro' '
    tags fd >global && tags lz >local && [ -s global ] && [ -s local ] &&
    comm -12 global local >got && cat got && [ ! -s got ]'

case $acme in
*-san|*-cov)	# not what an image is made of
	;;
*)	group 'the image'
	cd "$tmp" && image || exit
	;;
esac

finish
