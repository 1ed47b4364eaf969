"""The formats and codecs that can be loaded. All other lists of formats derive from this one.

FFmpeg supports hundreds more. Deliberately missing: playlists and manifests (they open other files
and addresses), devices, images, subtitles, music without samples (MIDI, modules), and formats that
only the extension identifies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A container format, or a family of them.

    Attributes:
        name: Name that `sniff` returns.
        demuxer: Name of the FFmpeg demuxer.
        extensions: Usual file name extensions.
        magic: Regular expression for its first bytes; None: `sniff` has its own check.
    """

    name: str
    demuxer: str
    extensions: str = ""
    magic: bytes | None = None


_LIST = (
    Format("wav", "wav", "wav wave", rb"RIF[FX]....WAVE"),
    Format("rf64", "wav", "rf64", rb"(RF64|BW64)....WAVE"),
    Format("w64", "w64", "w64", rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb"),
    Format("aiff", "aiff", "aif aiff aifc", rb"FORM....AIF[FC]"),
    Format("svx", "iff", "8svx", rb"FORM....(8SVX|16SV)"),
    Format("au", "au", "au snd", rb"\.snd|dns\."),
    Format("caf", "caf", "caf", rb"caff"),
    Format("voc", "voc", "voc", rb"Creative Voice File\x1a"),
    Format("sph", "nistsphere", "sph", rb"NIST_1A"),
    Format("ircam", "ircam", "sf", rb"\x64\xa3[\1-\4]\0|\0[\1-\4]\xa3\x64"),
    Format("flac", "flac", "flac"),
    Format("ogg-vorbis", "ogg", "ogg oga"),
    Format("ogg-opus", "ogg", "opus"),
    Format("ogg-flac", "ogg"),
    Format("ogg", "ogg", "spx ogv"),
    Format("mp3", "mp3", "mp3 mp2 mp1 mpa"),
    Format("aac", "aac", "aac"),
    Format(
        "mp4",
        "mov",
        "m4a m4b mp4 m4v mov 3gp 3g2",
        rb"....(?!ftyp(heic|heix|mif1|msf1|avif|avis))(ftyp|moov|mdat|wide|free|skip|pnot)",
    ),
    Format("matroska", "matroska", "mka mkv webm weba", rb"\x1a\x45\xdf\xa3"),
    Format("wavpack", "wv", "wv", rb"wvpk"),
    Format("ape", "ape", "ape", rb"MAC "),
    Format("tta", "tta", "tta", rb"TTA1"),
    Format("tak", "tak", "tak", rb"tBaK"),
    Format("shorten", "shn", "shn", rb"ajkg"),
    Format("musepack7", "mpc", "mpc mp+ mpp", rb"MP\+[\x07\x17\x27]"),
    Format("musepack8", "mpc8", "", rb"MPCK"),
    Format("dsf", "dsf", "dsf", rb"DSD \x1c\0\0\0"),
    Format("dff", "iff", "dff", rb"FRM8.{8}DSD "),
    Format(
        "asf", "asf", "wma wmv asf", rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62"
    ),
    Format("ac3", "ac3", "ac3"),
    Format("eac3", "eac3", "eac3 ec3"),
    Format(
        "dts",
        "dts",
        "dts",
        rb"\x7f\xfe\x80\x01|\xfe\x7f\x01\x80|\x1f\xff\xe8\x00\x07|\xff\x1f\x00\xe8.\x07",
    ),
    Format("dtshd", "dtshd", "dtshd", rb"DTSHDHDR"),
    Format("truehd", "truehd", "thd", rb"....\xf8\x72\x6f\xba"),
    Format("mlp", "mlp", "mlp", rb"....\xf8\x72\x6f\xbb"),
    Format("amr", "amr", "amr awb", rb"#!AMR(-WB)?\n"),
    Format("qoa", "qoa", "qoa", rb"qoaf"),
    Format("avi", "avi", "avi", rb"RIFF....AVI[ X\x19]"),
    Format("flv", "flv", "flv f4v", rb"FLV\x01"),
    Format("mpegts", "mpegts", "ts m2ts mts"),
    Format("mpeg", "mpeg", "mpg mpeg vob", rb"\0\0\x01\xba"),
    Format("real", "rm", "rm ra rmvb", rb"\.RMF|\.ra\xfd"),
)

FORMATS = {one.name: one for one in _LIST}

AUDIO_EXTENSIONS = tuple(
    dict.fromkeys(extension for one in _LIST for extension in one.extensions.split())
)
"""Extensions of files that are items by default."""

_DECODERS = """
    aac aac_latm ac3 alac als amrnb amrwb ape atrac1 atrac3 atrac3al atrac3plus atrac3plusal cook
    dca dfpwm dsd_lsbf dsd_lsbf_planar dsd_msbf dsd_msbf_planar dst eac3 flac g722 g723_1 g726
    g726le gsm gsm_ms ilbc libopencore_amrnb libopencore_amrwb libopus mace3 mace6 mlp mp1 mp1float
    mp2 mp2float mp3 mp3float mp3adu mp3adufloat mp3on4 mp3on4float mpc7 mpc8 nellymoser opus qcelp
    qdm2 qdmc qoa real_144 real_288 s302m sbc shorten sipr speex tak truehd truespeech tta vorbis
    wavpack wmalossless wmapro wmav1 wmav2 wmavoice

    8svx_exp 8svx_fib adpcm_adx adpcm_ct adpcm_g722 adpcm_ima_qt adpcm_ima_wav adpcm_ms
    adpcm_sbpro_2 adpcm_sbpro_3 adpcm_sbpro_4 adpcm_swf adpcm_yamaha

    pcm_alaw pcm_bluray pcm_dvd pcm_f16le pcm_f24le pcm_f32be pcm_f32le pcm_f64be pcm_f64le
    pcm_mulaw pcm_s8 pcm_s8_planar pcm_s16be pcm_s16be_planar pcm_s16le pcm_s16le_planar pcm_s24be
    pcm_s24daud pcm_s24le pcm_s24le_planar pcm_s32be pcm_s32le pcm_s32le_planar pcm_s64be pcm_s64le
    pcm_u8 pcm_u16be pcm_u16le pcm_u24be pcm_u24le pcm_u32be pcm_u32le pcm_vidc
"""

DECODERS = frozenset(_DECODERS.split())
"""FFmpeg's names of the audio decoders that are used; PyAV's FFmpeg has more."""

# No pattern may match the same bytes in two ways: each such repetition doubles the time.
_NOT_AUDIO = (
    ("a PNG image", rb"\x89PNG\r\n\x1a\n"),
    ("a JPEG image", rb"\xff\xd8\xff"),
    ("a GIF image", rb"GIF8[79]a"),
    ("a WebP image", rb"RIFF....WEBP"),
    ("a BMP image", rb"BM.{12}(\x28|\x6c|\x7c)\0\0\0"),
    ("a TIFF image", rb"II\*\0|MM\0\*"),
    ("a HEIF or AVIF image", rb"....ftyp(heic|heix|mif1|msf1|avif|avis)"),
    ("a PDF document", rb"%PDF-"),
    ("a ZIP archive", rb"PK\x03\x04|PK\x05\x06"),
    ("a RAR archive", rb"Rar!\x1a\x07"),
    ("a 7-Zip archive", rb"7z\xbc\xaf\x27\x1c"),
    ("gzip-compressed data", rb"\x1f\x8b\x08"),
    ("Zstandard-compressed data", rb"\x28\xb5\x2f\xfd"),
    ("bzip2-compressed data", rb"BZh[1-9]1AY&SY"),
    ("xz-compressed data", rb"\xfd7zXZ\0"),
    ("a tar archive", rb".{257}ustar"),
    ("a MIDI file, which holds notes and no samples", rb"MThd|RIFF....RMID"),
    ("a tracker module, which holds notes", rb"Extended Module: |IMPM|.{44}SCRM|.{1080}M\.K\."),
    ("a SoundFont", rb"RIFF....sfbk"),
    ("an AppleDouble file of macOS, which holds no audio", rb"\0\x05\x16[\0\x07]\0\x02\0\0"),
    ("a Git LFS pointer: fetch its file with `git lfs pull`", rb"version https://git-lfs"),
    ("a playlist", rb"(\xef\xbb\xbf)?\s*(#EXTM3U|\[playlist\]|<\?wpl|(?i:<asx))"),
    ("an MPEG-DASH manifest", rb"(<\?xml[^>]*>\s*)?(<!--(?:(?!-->).)*-->\s*)*<MPD[\s>]"),
    ("a session description (SDP)", rb"v=0\r?\no="),
    ("FFmpeg metadata", rb";FFMETADATA"),
    ("a concat list of FFmpeg", rb"ffconcat version"),
    ("an OptimFROG file, which FFmpeg does not read", rb"OFR |ofr "),
    ("a Lossless Audio (LA) file, which FFmpeg does not read", rb"LA0[234]"),
    ("an encrypted TTA2 file", rb"TTA2"),
    ("an Audible audiobook, which is encrypted", rb"....\x57\x90\x75\x36"),
    ("AC-4, which FFmpeg does not decode", rb"\xac[\x40\x41]"),
    ("a web page", rb"(?i:\s*<!doctype html|\s*<html)"),
    ("an XML document", rb"(\xef\xbb\xbf)?<\?xml"),
    ("an executable", rb"\x7fELF|MZ.{58}"),
    ("a Parquet table", rb"PAR1"),
    ("an HDF5 file", rb"\x89HDF\r\n\x1a\n"),
    ("a NumPy array", rb"\x93NUMPY"),
)

_PATTERNS = [(one.name, re.compile(one.magic, re.DOTALL)) for one in _LIST if one.magic]
_OTHERS = [(name, re.compile(magic, re.DOTALL)) for name, magic in _NOT_AUDIO]


def by_magic(head: bytes) -> str | None:
    """The name of the format whose magic bytes a file starts with."""
    return next((name for name, magic in _PATTERNS if magic.match(head)), None)


def not_audio(head: bytes) -> str | None:
    """What a file without audio is according to its first bytes, such as `a PNG image`."""
    return next((name for name, magic in _OTHERS if magic.match(head)), None)
