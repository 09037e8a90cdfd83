# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: optimize.use_switch=True
"""
The kernel in C, by way of Cython: `hygiene.kernel` says what it does, `hygiene.kernel.pure` does the same in Python.

Theory of operation
===================

**The entries are in the dict**, as everybody sees them. Beside it is an array of nodes, one for each key, found by a
hash table of indices (chained, at most one node a bucket on average) and linked by indices in the order of recency:
40 bytes, and 4 to 8 for the bucket. Times of writing and of use are arrays of their own, 16 bytes each, made where they
are wanted; each is a list, too. A node holds a reference to its key.

**One look-up for a read.** A node also points at the value, without a reference: the dict holds one. That is right as
long as the dict was changed by nobody but this code, and CPython says whether it was: each change of a dict gives it a
new version (``ma_version_tag``, CPython 3.11 to 3.13), or calls whoever watches it (`PyDict_Watch`; here that counts
`version`). `seen` is the version after our last change. Where the dict has another, somebody has gone past the
registry, by ``dict.__setitem__(r, key, value)`` say: from then on values are looked up in the dict, and the order looks
after itself (`_adopt`).

**Code that runs in between.** Under the GIL nothing happens at the same time; what can come in between is code that is
called from here: ``__eq__`` and ``__hash__`` of keys, and ``__del__`` of what loses its last reference.

- A comparison may change everything. `_node_of` notices by `changes`, which counts keys that came and went, and begins
  again, as a dict does. It returns an index that is right until the next comparison.
- A change of the dict compares keys as well, where hashes are equal and the keys are not the same object. As long as
  all keys are of types whose comparison is C code (`is_plain`), or no other key has that hash (`_collides`), it runs
  nothing of the user's, and dict and nodes change in one step. At the first collision of others `seen` is given up for
  good, and after each change of the dict the node is looked for again.
- References are given up last: what is to die is held until dict and nodes agree.

A free-threaded build does not take this body. The tests run the same programs on both.
"""

import sys
import time

from hygiene.kernel.pure import ATOMIC, CROWDED, MISSING, STRONG

from cpython.object cimport PyObject
from cython cimport final
from libc.math cimport INFINITY, NAN, isnan
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport free, malloc, realloc

__all__ = [
    "ATOMIC",
    "CROWDED",
    "FRAMES",
    "INTERFACE",
    "MISSING",
    "PARKS",
    "STATE",
    "STRONG",
    "Kernel",
    "LinkedOrder",
    "by_recency",
    "contains_timed",
    "get_timed",
    "is_atomic",
    "move",
    "oldest",
    "quicken",
    "read_timed",
    "store",
    "take",
    "take_oldest",
]

cdef extern from *:
    """
    #if PY_VERSION_HEX < 0x030B0000 || PY_VERSION_HEX >= 0x03100000 || defined(Py_GIL_DISABLED) || defined(PYPY_VERSION)
    #error "the compiled kernel is for CPython 3.11 to 3.15 with the GIL"
    #endif

    /* An OrderedDict, which CPython does not describe in public: the import fails where it has another size. */
    typedef struct {
        PyDictObject dict;
        void *first, *last, **fast_nodes;
        Py_ssize_t fast_nodes_size;
        void *resize_sentinel;
        size_t state;
        PyObject *attributes, *weakrefs;
    } HygieneOrderedDict;

    #if PY_VERSION_HEX >= 0x030D0000 /* exported for extension modules of CPython's own, and declared for them only */
    PyAPI_FUNC(int) _PyDict_SetItem_KnownHash(PyObject *dict, PyObject *key, PyObject *value, Py_hash_t hash);
    PyAPI_FUNC(int) _PyDict_DelItem_KnownHash(PyObject *dict, PyObject *key, Py_hash_t hash);
    #endif

    /* What was deleted from an attribute of such a type is None, and as good as empty. */
    static inline Py_ssize_t hygiene_dict_size(PyObject *dict) { return dict == Py_None ? 0 : PyDict_GET_SIZE(dict); }
    static inline Py_ssize_t hygiene_set_size(PyObject *set) { return set == Py_None ? 0 : PySet_GET_SIZE(set); }

    typedef struct {
        PyObject *key;   /* owned; NULL in a node that is free */
        PyObject *value; /* borrowed from the dict; right while `seen` is its version */
        Py_hash_t hash;
        int32_t chain;   /* the next in the bucket, or the next free one; -1: none */
        int32_t prev, next;
        int32_t linked;  /* whether it is in the order of recency */
    } HygieneNode;

    typedef struct {
        double at;       /* NaN: never */
        int32_t prev, next;
    } HygieneStamp;

    /* 2 to the 64 divided by the golden ratio: Knuth's multiplicative hashing. */
    #define HYGIENE_SPREAD UINT64_C(0x9E3779B97F4A7C15)

    static int32_t hygiene_no_buckets[2] = {-1, -1};

    /* Each change of a dict gives it a new version; since 3.14 it has none, and who watches it counts the changes. */
    #if PY_VERSION_HEX >= 0x030E0000
    #define HYGIENE_WATCHES 1
    static inline uint64_t hygiene_version(PyObject *dict) { return 0; }
    static int hygiene_add_watcher(void *changed) { return PyDict_AddWatcher((PyDict_WatchCallback)changed); }
    static int hygiene_watch(int watcher, PyObject *dict) { return PyDict_Watch(watcher, dict); }
    #else
    #define HYGIENE_WATCHES 0
    static inline uint64_t hygiene_version(PyObject *dict) {
        _Py_COMP_DIAG_PUSH
        _Py_COMP_DIAG_IGNORE_DEPR_DECLS
        return ((PyDictObject *)dict)->ma_version_tag;
        _Py_COMP_DIAG_POP
    }
    static int hygiene_add_watcher(void *changed) { return 0; }
    static int hygiene_watch(int watcher, PyObject *dict) { return 0; }
    #endif

    /* An int is a tag, which tells its sign and length, and digits. Small ones have a bit of their own in it. */
    #if PY_VERSION_HEX >= 0x030E0000
    #define HYGIENE_INT_TAG(a) (((PyLongObject *)(a))->long_value.lv_tag & ~(uintptr_t)4)
    #define HYGIENE_INT_LENGTH(tag) ((tag) >> 3)
    #define HYGIENE_ONE_DIGIT ((uintptr_t)1 << 3)
    #define HYGIENE_DIGITS(a) (((PyLongObject *)(a))->long_value.ob_digit)
    #elif PY_VERSION_HEX >= 0x030C0000
    #define HYGIENE_INT_TAG(a) (((PyLongObject *)(a))->long_value.lv_tag)
    #define HYGIENE_INT_LENGTH(tag) ((tag) >> 3)
    #define HYGIENE_ONE_DIGIT ((uintptr_t)1 << 3)
    #define HYGIENE_DIGITS(a) (((PyLongObject *)(a))->long_value.ob_digit)
    #else
    #define HYGIENE_INT_TAG(a) Py_SIZE(a)
    #define HYGIENE_INT_LENGTH(tag) ((tag) < 0 ? -(tag) : (tag))
    #define HYGIENE_ONE_DIGIT 1
    #define HYGIENE_DIGITS(a) (((PyLongObject *)(a))->ob_digit)
    #endif

    static inline Py_hash_t hygiene_hash(PyObject *key) {
        if (PyUnicode_CheckExact(key)) {
            Py_hash_t known = ((PyASCIIObject *)key)->hash;
            if (known != -1) return known;
        }
        if (PyLong_CheckExact(key)) {
            if (HYGIENE_INT_TAG(key) == HYGIENE_ONE_DIGIT) return (Py_hash_t)HYGIENE_DIGITS(key)[0];
            return PyLong_Type.tp_hash(key);
        }
        return PyObject_Hash(key);
    }

    /* Both have been hashed, so both are ready. */
    static inline int hygiene_same_text(PyObject *a, PyObject *b) {
        Py_ssize_t length = PyUnicode_GET_LENGTH(a);
        int kind = PyUnicode_KIND(a);
        return length == PyUnicode_GET_LENGTH(b) && kind == (int)PyUnicode_KIND(b)
            && memcmp(PyUnicode_DATA(a), PyUnicode_DATA(b), (size_t)length * (size_t)kind) == 0;
    }

    static int hygiene_bytes_warn = 0;

    /* Whether comparing it with another of this kind is C code, all of it, and will always be. */
    static int hygiene_is_plain(PyObject *key, int depth) {
        PyTypeObject *type = Py_TYPE(key);
        if (type == &PyUnicode_Type || type == &PyLong_Type || type == &PyFloat_Type || type == &PyBool_Type
            || key == Py_None)
            return 1;
        if (type == &PyBytes_Type) return !hygiene_bytes_warn; /* under `python -b` a comparison with str may run code */
        if (type == &PyTuple_Type && depth > 0) {
            for (Py_ssize_t i = PyTuple_GET_SIZE(key); i-- > 0;)
                if (!hygiene_is_plain(PyTuple_GET_ITEM(key, i), depth - 1)) return 0;
            return 1;
        }
        /* By identity, and for good: a class of Python's can be given an `__eq__` later, a module another class. */
        return type->tp_richcompare == PyBaseObject_Type.tp_richcompare
            && (type->tp_flags & Py_TPFLAGS_IMMUTABLETYPE) && type != &PyModule_Type;
    }

    /* Whether a value of this type never comes back once it was evicted, since an equal one does as well. */
    static inline int hygiene_is_strong(PyObject *value) {
        PyTypeObject *type = Py_TYPE(value);
        return type == &PyFloat_Type || type == &PyLong_Type || type == &PyUnicode_Type || value == Py_None
            || type == &PyBytes_Type || type == &PyBool_Type;
    }

    /* As a dict does, and without the frame that Cython would make for the traceback: a miss is nothing unusual. */
    static void hygiene_raise_key_error(PyObject *key) {
        PyObject *arguments;
        if (PyUnicode_CheckExact(key) || PyLong_CheckExact(key)) {
            PyErr_SetObject(PyExc_KeyError, key);
            return;
        }
        /* By itself a tuple would be taken for several arguments, None for none, and an exception for what to raise. */
        arguments = PyTuple_Pack(1, key);
        if (arguments != NULL) {
            PyErr_SetObject(PyExc_KeyError, arguments);
            Py_DECREF(arguments);
        }
    }

    /* Let the slot of ``r[key]`` be this function, for the type and for the subclasses to come. */
    static int hygiene_replace_subscript(PyObject *type, void *function) {
        PyObject *wrapper = PyDict_GetItemString(((PyTypeObject *)type)->tp_dict, "__getitem__");
        if (wrapper == NULL || !Py_IS_TYPE(wrapper, &PyWrapperDescr_Type)) {
            PyErr_SetString(PyExc_ImportError, "the slot of __getitem__ is not what it was");
            return -1;
        }
        ((PyWrapperDescrObject *)wrapper)->d_wrapped = function;
        ((PyTypeObject *)type)->tp_as_mapping->mp_subscript = (binaryfunc)function;
        return 0;
    }

    /* ``get``, whose arguments Cython would count, copy and look through for keywords. */
    static PyMethodDef hygiene_get = {
        "get", NULL, METH_FASTCALL,
        "get($self, key, default=None, /)\\n--\\n\\nThe value of *key*, or *default*; a hit counts as use."
    };

    static PyObject *hygiene_make_get(PyObject *type, void *function) {
        hygiene_get.ml_meth = (PyCFunction)function;
        return PyDescr_NewMethod((PyTypeObject *)type, &hygiene_get);
    }

    static int hygiene_give(PyObject *type, const char *name, PyObject *method) {
        int failed = PyDict_SetItemString(((PyTypeObject *)type)->tp_dict, name, method);
        PyType_Modified((PyTypeObject *)type);
        return failed;
    }

    /* Of exact ints. */
    static inline int hygiene_same_int(PyObject *a, PyObject *b) {
        return HYGIENE_INT_TAG(a) == HYGIENE_INT_TAG(b)
            && memcmp(HYGIENE_DIGITS(a), HYGIENE_DIGITS(b), sizeof(digit) * (size_t)HYGIENE_INT_LENGTH(HYGIENE_INT_TAG(a))) == 0;
    }

    /* The clock of time.monotonic(), to the same last digit or the one beside it. */
    #if defined(__linux__)
    #include <time.h>
    static inline double hygiene_monotonic(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (double)((int64_t)now.tv_sec * 1000000000 + now.tv_nsec) / 1e9;
    }
    #elif PY_VERSION_HEX >= 0x030D0000
    static inline double hygiene_monotonic(void) {
        PyTime_t now;
        return PyTime_MonotonicRaw(&now) < 0 ? 0.0 : PyTime_AsSecondsDouble(now);
    }
    #else
    static inline double hygiene_monotonic(void) { return _PyTime_AsSecondsDouble(_PyTime_GetMonotonicClock()); }
    #endif
    """
    ctypedef class collections.OrderedDict [object HygieneOrderedDict, check_size error]:
        pass

    ctypedef struct Node "HygieneNode":
        PyObject *key
        PyObject *value
        Py_hash_t hash
        int32_t chain
        int32_t prev
        int32_t next
        int32_t linked

    ctypedef struct Stamp "HygieneStamp":
        double at
        int32_t prev
        int32_t next

    int32_t *no_buckets "hygiene_no_buckets"
    uint64_t SPREAD "HYGIENE_SPREAD"
    int bytes_warn "hygiene_bytes_warn"
    bint WATCHES "HYGIENE_WATCHES"
    uint64_t tag_of "hygiene_version"(object)
    int add_watcher "hygiene_add_watcher"(void *) except -1
    int watch "hygiene_watch"(int, object) except -1
    Py_hash_t hash_of "hygiene_hash"(object) except -1
    bint same_text "hygiene_same_text"(PyObject *, PyObject *)
    bint is_plain "hygiene_is_plain"(object, int)
    bint is_strong "hygiene_is_strong"(object)
    double monotonic "hygiene_monotonic"()

    PyObject *dict_get "_PyDict_GetItem_KnownHash"(object, PyObject *, Py_hash_t) except? NULL
    int dict_set "_PyDict_SetItem_KnownHash"(object, PyObject *, PyObject *, Py_hash_t) except -1
    int dict_delete "_PyDict_DelItem_KnownHash"(object, PyObject *, Py_hash_t) except -1
    int dict_contains "PyDict_Contains"(object, object) except -1
    Py_ssize_t dict_size "hygiene_dict_size"(object)
    Py_ssize_t set_size "hygiene_set_size"(object)
    int compare "PyObject_RichCompareBool"(PyObject *, PyObject *, int)
    int EQ "Py_EQ"
    bint is_text "PyUnicode_CheckExact"(PyObject *)
    void hold "Py_INCREF"(PyObject *)
    void drop "Py_DECREF"(PyObject *)
    Py_ssize_t references "Py_REFCNT"(PyObject *)
    void set_references "Py_SET_REFCNT"(PyObject *, Py_ssize_t)

    void raise_key_error "hygiene_raise_key_error"(object)
    int replace_subscript "hygiene_replace_subscript"(object, void *) except -1
    object make_get "hygiene_make_get"(object, void *)
    int give "hygiene_give"(object, const char *, object) except -1
    bint same_int "hygiene_same_int"(PyObject *, PyObject *)
    bint is_int "PyLong_CheckExact"(PyObject *)

    ctypedef int (*Visit "visitproc")(PyObject *, void *) noexcept
    ctypedef int (*Traverse "traverseproc")(PyObject *, Visit, void *) noexcept
    ctypedef int (*Clear "inquiry")(PyObject *) noexcept
    ctypedef struct SlotType "PyTypeObject":
        Traverse tp_traverse
        Clear tp_clear

# The description that this body was written after; see `hygiene.kernel.pure`.
INTERFACE = 3
bytes_warn = sys.flags.bytes_warning

# Whether an order of entries that may leave (`LinkedOrder`) is a view of the kernel's own.
PARKS = True
# Frames between who looks something up and `_lookup`: C code has none.
FRAMES = 1

cdef object _missing = MISSING
cdef object _monotonic = time.monotonic
cdef enum:
    ABSENT = -1  # see `Kernel._use`
    LONG = -3
    SMALLEST = 8  # nodes
    MOST = 0x7FFFFFFF
    LARGE = 1024  # fewer nodes are not worth giving back


cdef inline void _renumber(int32_t *index, int32_t *moved) noexcept:
    if index[0] >= 0:
        index[0] = moved[index[0]]


cdef class LinkedOrder
cdef class Kernel(OrderedDict)


cdef int _changed(int event, PyObject *kernel, PyObject *key, PyObject *value) noexcept:
    """CPython is about to change the dict that is this kernel."""
    (<Kernel>kernel).version += 1
    return 0


cdef int _watcher = add_watcher(<void *>_changed)


cdef class Kernel(OrderedDict):
    """The entries of a registry; see the package for what it has and asks for."""

    cdef Node *nodes
    cdef int32_t *buckets
    cdef Stamp *written  # NULL: no times of writing; so for `used`
    cdef Stamp *used
    cdef int shift  # the number of buckets is 2 ** (64 - shift)
    cdef int32_t capacity, fresh, freed, count  # of nodes: room, the first never used, free ones chained, those in use
    cdef int32_t first, last, first_written, last_written, first_used, last_used
    cdef uint64_t version, seen, changes, hits, misses, evictions
    cdef bint wants_written, wants_used, uses_in_order, loose, real_time
    cdef public bint _clocked
    cdef bint reads, misses_here, moves
    cdef readonly bint _light
    cdef public bint _watched, _mortal  # the second is for the other body
    cdef public double _due
    cdef public Py_ssize_t _bound
    cdef public dict _leases
    cdef public object _timer, _keeper
    cdef public set _asking
    cdef public dict _held
    cdef object tail
    cdef dict tail_data
    cdef LinkedOrder view

    def __cinit__(self, *args, **kwargs):
        self.version = 1
        if WATCHES:
            watch(_watcher, self)
        self.buckets = no_buckets
        self.shift = 63
        self._forget_nodes()
        self._bound = sys.maxsize
        self._due = INFINITY
        self._leases = {}
        self._asking = set()
        self._held = {}

    @final
    cdef void _forget_nodes(self) noexcept:
        self.capacity = self.fresh = self.count = 0
        self.freed = self.first = self.last = -1
        self.first_written = self.last_written = self.first_used = self.last_used = -1

    def __dealloc__(self):
        if self.view is not None:
            self.view.kernel = NULL
        # Cython lends the dying a reference, with which a weak reference would find it alive: here keys die, and with
        # them code runs that may follow one.
        set_references(<PyObject *>self, 0)
        self._release()
        set_references(<PyObject *>self, 1)

    @final
    cdef void _release(self) noexcept:
        """Give up all nodes. The keys that die may run code, which finds none."""
        cdef Node *nodes = self.nodes
        cdef int32_t i, fresh = self.fresh
        if self.buckets != no_buckets:
            free(self.buckets)
        free(self.written)
        free(self.used)
        self.nodes = NULL
        self.buckets = no_buckets
        self.shift = 63
        self.written = self.used = NULL
        self._forget_nodes()
        self.changes += 1
        self.seen = 0
        for i in range(fresh):
            if nodes[i].key != NULL:
                drop(nodes[i].key)
        free(nodes)

    def _open(self, Py_ssize_t bound, timer, *, bint written, bint used):
        """Begin: with times of writing or of use where they are wanted."""
        self._bound = bound
        self._leases = {}
        self.tail = self.tail_data = None
        self._timer = timer
        self._clocked = timer is not None
        self.real_time = timer is _monotonic
        self._due = INFINITY
        self.wants_written, self.wants_used, self.uses_in_order = written, used, False
        self.reads = self.misses_here = self._light = False
        self.hits = self.misses = self.evictions = 0
        self._release()
        self.loose = False
        self.seen = 0 if dict_size(self) else self._version()

    def _keep_times(self, timer, *, bint written, bint used):
        """From now on keep times of writing or of use. Entries that have none count from now."""
        cdef double now = timer()
        cdef Stamp *stamps
        cdef int32_t i
        if self._strays():
            self._adopt()
        # Nothing from here on runs code of others: what has been reserved is what is stamped.
        if written and not self.wants_written:
            if self.capacity:
                stamps = <Stamp *>malloc(self.capacity * sizeof(Stamp))
                if stamps == NULL:
                    raise MemoryError
                self.written = stamps
                self._stamp_all(stamps, now, &self.first_written, &self.last_written)
            self.wants_written = True
        if used and not self.wants_used:
            if self.capacity:
                stamps = <Stamp *>malloc(self.capacity * sizeof(Stamp))
                if stamps == NULL:
                    raise MemoryError
                self.used = stamps
                self._stamp_all(stamps, now, &self.first_used, &self.last_used)
            self.wants_used = True
        self._timer = timer
        self.real_time = timer is _monotonic
        self._clocked = True

    @final
    cdef void _stamp_all(self, Stamp *stamps, double now, int32_t *first, int32_t *last) noexcept:
        """Each node has this time, in the order of recency; those that are out of that order come last."""
        cdef int32_t i
        for i in range(self.fresh):
            stamps[i].at = NAN
            stamps[i].prev = stamps[i].next = -1
        first[0] = last[0] = -1
        i = self.first
        while i >= 0:
            stamps[i].at = now
            self._append(stamps, i, first, last)
            i = self.nodes[i].next
        for i in range(self.fresh):
            if self.nodes[i].key != NULL and not self.nodes[i].linked:
                stamps[i].at = now
                self._append(stamps, i, first, last)

    def _take_paths(self, *, bint reads, bint misses, bint writes, bint moves, bint uses_in_order):
        """Decide which short ways are open; see the pure body."""
        self.reads, self.misses_here, self._light, self.moves = reads, reads and misses, writes, moves
        if uses_in_order and not self.uses_in_order:
            self._order_uses()
        self.uses_in_order = uses_in_order

    def _counted(self):
        """Hits, misses and evictions on the short ways."""
        return self.hits, self.misses, self.evictions

    @property
    def _tail(self):
        return self.tail

    @_tail.setter
    def _tail(self, tail):
        self.tail = tail
        self.tail_data = None if tail is None else tail.data  # asking the tail for its length runs Python code

    def __sizeof__(self):
        cdef Py_ssize_t each = sizeof(Node)
        each += sizeof(Stamp) * ((self.written != NULL) + (self.used != NULL))
        buckets = 0 if self.buckets == no_buckets else <Py_ssize_t>4 << (64 - self.shift)
        return OrderedDict.__sizeof__(self) + self.capacity * each + buckets

    # Nodes.

    @final
    cdef int32_t _node_of(self, object key, Py_hash_t hash) except -2:
        """The index of the node of *key*, -1 if there is none: right until the next comparison."""
        cdef int32_t i
        cdef Node *node
        cdef PyObject *stored
        cdef uint64_t changes
        cdef int same
        while True:
            i = self.buckets[(<uint64_t>hash * SPREAD) >> self.shift]
            while i >= 0:
                node = &self.nodes[i]
                if node.hash == hash:
                    stored = node.key
                    if stored == <PyObject *>key:
                        return i
                    if is_text(stored) and is_text(<PyObject *>key):
                        if same_text(stored, <PyObject *>key):
                            return i
                    elif is_int(stored) and is_int(<PyObject *>key):
                        if same_int(stored, <PyObject *>key):
                            return i
                    else:
                        changes = self.changes
                        hold(stored)
                        same = compare(stored, <PyObject *>key, EQ)
                        drop(stored)
                        if same < 0:
                            return -2
                        if changes != self.changes:
                            break
                        if same:
                            return i
                i = self.nodes[i].chain
            else:
                return -1

    cdef inline void _unlink(self, int32_t i) noexcept:
        cdef Node *node = &self.nodes[i]
        if node.prev >= 0:
            self.nodes[node.prev].next = node.next
        else:
            self.first = node.next
        if node.next >= 0:
            self.nodes[node.next].prev = node.prev
        else:
            self.last = node.prev
        node.linked = False

    cdef inline void _link(self, int32_t i) noexcept:
        cdef Node *node = &self.nodes[i]
        node.prev = self.last
        node.next = -1
        if self.last >= 0:
            self.nodes[self.last].next = i
        else:
            self.first = i
        self.last = i
        node.linked = True

    cdef inline void _to_end(self, int32_t i) noexcept:
        if i != self.last:
            if self.nodes[i].linked:
                self._unlink(i)
            self._link(i)

    @final
    cdef void _to_front(self, int32_t i) noexcept:
        cdef Node *node = &self.nodes[i]
        if i == self.first:
            return
        if node.linked:
            self._unlink(i)
        node.prev = -1
        node.next = self.first
        if self.first >= 0:
            self.nodes[self.first].prev = i
        else:
            self.last = i
        self.first = i
        node.linked = True

    @final
    cdef void _cut(self, Stamp *stamps, int32_t i, int32_t *first, int32_t *last) noexcept:
        """Take *i* out of the list of these times."""
        cdef Stamp *stamp = &stamps[i]
        if stamp.prev >= 0:
            stamps[stamp.prev].next = stamp.next
        elif first[0] == i:
            first[0] = stamp.next
        else:
            return
        if stamp.next >= 0:
            stamps[stamp.next].prev = stamp.prev
        else:
            last[0] = stamp.prev
        stamp.prev = stamp.next = -1

    @final
    cdef void _append(self, Stamp *stamps, int32_t i, int32_t *first, int32_t *last) noexcept:
        """Put *i* at the end of the list of these times."""
        if last[0] == i:
            return
        self._cut(stamps, i, first, last)
        stamps[i].prev = last[0]
        stamps[i].next = -1
        if last[0] >= 0:
            stamps[last[0]].next = i
        else:
            first[0] = i
        last[0] = i

    @final
    cdef int _reserve(self) except -1:
        """Make room for one more node, before anything is changed."""
        cdef int64_t size
        cdef void *moved
        cdef int32_t *buckets
        cdef int shift
        if self.freed >= 0 or self.fresh < self.capacity:
            return 0
        if self.capacity == MOST:
            raise MemoryError("a registry holds 2 ** 31 - 1 entries at most")
        size = <int64_t>self.capacity + (self.capacity >> 1) + SMALLEST
        # A writer looks at the bound after it has put its entry in, so there is one more for a moment.
        if self.capacity <= self._bound < size - 1:
            size = self._bound + 1
        size = min(size, <int64_t>MOST)
        moved = realloc(self.nodes, size * sizeof(Node))
        if moved == NULL:
            raise MemoryError
        self.nodes = <Node *>moved
        if self.wants_written:
            moved = realloc(self.written, size * sizeof(Stamp))
            if moved == NULL:
                raise MemoryError
            self.written = <Stamp *>moved
        if self.wants_used:
            moved = realloc(self.used, size * sizeof(Stamp))
            if moved == NULL:
                raise MemoryError
            self.used = <Stamp *>moved
        if size > (<int64_t>1 << (64 - self.shift)) or self.buckets == no_buckets:
            shift = self.shift
            while size > (<int64_t>1 << (64 - shift)):
                shift -= 1
            buckets = <int32_t *>malloc((<size_t>1 << (64 - shift)) * sizeof(int32_t))
            if buckets == NULL:
                raise MemoryError
            self._spread(buckets, shift)
        self.capacity = <int32_t>size
        return 0

    @final
    cdef void _spread(self, int32_t *buckets, int shift) noexcept:
        """From now on these are the buckets."""
        cdef int64_t b
        cdef int32_t i
        cdef Node *node
        for b in range(<int64_t>1 << (64 - shift)):
            buckets[b] = -1
        for i in range(self.fresh):
            node = &self.nodes[i]
            if node.key != NULL:
                b = (<uint64_t>node.hash * SPREAD) >> shift
                node.chain = buckets[b]
                buckets[b] = i
        if self.buckets != no_buckets:
            free(self.buckets)
        self.buckets = buckets
        self.shift = shift
        self.changes += 1

    @final
    cdef int32_t _insert(self, object key, Py_hash_t hash, object value) noexcept:
        """A node for *key*, which has none, as the most recent; the room is reserved."""
        cdef int32_t i = self.freed
        cdef Node *node
        cdef uint64_t b = (<uint64_t>hash * SPREAD) >> self.shift
        if i >= 0:
            self.freed = self.nodes[i].chain
        else:
            i = self.fresh
            self.fresh += 1
        node = &self.nodes[i]
        hold(<PyObject *>key)
        node.key = <PyObject *>key
        node.value = <PyObject *>value
        node.hash = hash
        node.chain = self.buckets[b]
        self.buckets[b] = i
        self._link(i)
        if self.written != NULL:
            self.written[i].at = NAN
            self.written[i].prev = self.written[i].next = -1
        if self.used != NULL:
            self.used[i].at = NAN
            self.used[i].prev = self.used[i].next = -1
        self.count += 1
        self.changes += 1
        return i

    @final
    cdef void _free_node(self, int32_t i) noexcept:
        """Take node *i* out of everything; its reference to the key is now the caller's."""
        cdef Node *node = &self.nodes[i]
        cdef int32_t *at = &self.buckets[(<uint64_t>node.hash * SPREAD) >> self.shift]
        while at[0] != i:
            at = &self.nodes[at[0]].chain
        at[0] = node.chain
        if node.linked:
            self._unlink(i)
        if self.written != NULL:
            self._cut(self.written, i, &self.first_written, &self.last_written)
        if self.used != NULL:
            self._cut(self.used, i, &self.first_used, &self.last_used)
        node.key = node.value = NULL
        node.chain = self.freed
        self.freed = i
        self.count -= 1
        self.changes += 1
        if self.capacity > LARGE and self.count < self.capacity >> 3:
            self._shrink()

    @final
    cdef void _shrink(self) noexcept:
        """Move the nodes into an eighth of their room or so, if there is memory to do it in: what was large is not now."""
        cdef int64_t size = <int64_t>self.count + (self.count >> 1) + SMALLEST
        cdef int shift = 63
        cdef int32_t old, new = 0
        cdef Node *node
        while size > (<int64_t>1 << (64 - shift)):
            shift -= 1
        cdef Node *nodes = <Node *>malloc(size * sizeof(Node))
        cdef Stamp *written = NULL if self.written == NULL else <Stamp *>malloc(size * sizeof(Stamp))
        cdef Stamp *used = NULL if self.used == NULL else <Stamp *>malloc(size * sizeof(Stamp))
        cdef int32_t *buckets = <int32_t *>malloc((<size_t>1 << (64 - shift)) * sizeof(int32_t))
        cdef int32_t *moved = <int32_t *>malloc(self.fresh * sizeof(int32_t))
        if (
            nodes == NULL or buckets == NULL or moved == NULL
            or (written == NULL and self.written != NULL) or (used == NULL and self.used != NULL)
        ):
            free(nodes)
            free(written)
            free(used)
            free(buckets)
            free(moved)
            return
        for old in range(self.fresh):
            if self.nodes[old].key != NULL:
                moved[old] = new
                nodes[new] = self.nodes[old]
                if written != NULL:
                    written[new] = self.written[old]
                if used != NULL:
                    used[new] = self.used[old]
                new += 1
        for old in range(new):
            node = &nodes[old]
            if node.linked:
                _renumber(&node.prev, moved)
                _renumber(&node.next, moved)
            if written != NULL:
                _renumber(&written[old].prev, moved)
                _renumber(&written[old].next, moved)
            if used != NULL:
                _renumber(&used[old].prev, moved)
                _renumber(&used[old].next, moved)
        _renumber(&self.first, moved)
        _renumber(&self.last, moved)
        _renumber(&self.first_written, moved)
        _renumber(&self.last_written, moved)
        _renumber(&self.first_used, moved)
        _renumber(&self.last_used, moved)
        free(moved)
        free(self.nodes)
        free(self.written)
        free(self.used)
        self.nodes, self.written, self.used = nodes, written, used
        self.capacity, self.fresh, self.freed = <int32_t>size, new, -1
        self._spread(buckets, shift)

    @final
    cdef int _adopt(self) except -1:
        """Give each key that went past the registry a place in the order: before all who came through the door."""
        cdef Py_hash_t hash
        cdef object key
        for key in reversed(list(OrderedDict_keys(self))):
            hash = hash_of(key)
            if self._node_of(key, hash) < 0:
                self._reserve()
                self.seen = 0  # the hash or the comparison may have begun anew, and the key be gone
                self._to_front(self._insert(key, hash, None))
        return 0

    @final
    cdef bint _strays(self) noexcept:
        """Whether the dict has keys that the order does not know."""
        return self.count < dict_size(self)

    # Dict and nodes together.

    @final
    cdef bint _collides(self, Py_hash_t hash, int32_t i) noexcept:
        """Whether the dict, asked for node *i* (-1: for a key that it has not), compares keys, and that may run code."""
        cdef int32_t other
        if not self.loose:
            return False
        other = self.buckets[(<uint64_t>hash * SPREAD) >> self.shift]
        while other >= 0 and (other == i or self.nodes[other].hash != hash):
            other = self.nodes[other].chain
        return other >= 0

    cdef inline uint64_t _version(self) noexcept:
        """Another one after each change of the dict, whoever made it; never 0."""
        return self.version if WATCHES else tag_of(self)

    cdef inline bint _in_step(self) noexcept:
        return self.seen == self._version()

    @final
    cdef int _put_in(self, object key, object value, bint recent, double now) except -1:
        """``dict[key] = value``; a new key is the most recent, an old one if *recent* is set. NaN: no times are noted."""
        cdef Py_hash_t hash = hash_of(key)
        cdef int32_t i = self._node_of(key, hash)
        cdef PyObject *old
        if i < 0:
            self._reserve()
            if not self.loose and not is_plain(key, 3):
                self.loose = True
            if self._in_step() and not self._collides(hash, -1):
                dict_set(self, <PyObject *>key, <PyObject *>value, hash)
                self._stamp(self._insert(key, hash, value), now)
                self.seen = self._version()
                return 0
        elif self._in_step() and not self._collides(hash, i):
            if recent:
                self._to_end(i)
            self._stamp(i, now)
            old = self.nodes[i].value
            hold(old)
            try:
                dict_set(self, self.nodes[i].key, <PyObject *>value, hash)
                self.nodes[i].value = <PyObject *>value
                self.seen = self._version()
            finally:
                drop(old)
            return 0
        self.seen = 0
        dict_set(self, <PyObject *>key, <PyObject *>value, hash)
        i = self._node_of(key, hash)
        if i < 0:
            self._reserve()
            self.seen = 0  # whoever came in between may have begun anew, and the key may be gone
            i = self._insert(key, hash, value)
        elif recent:
            self._to_end(i)
        self._stamp(i, now)
        return 0

    @final
    cdef object _take_out(self, int32_t i):
        """The value of node *i*, which leaves dict and nodes; `MISSING` if the dict had no such key."""
        cdef PyObject *key = self.nodes[i].key
        cdef PyObject *found
        cdef Py_hash_t hash = self.nodes[i].hash
        cdef object value = _missing
        if self._in_step() and not self._collides(hash, i):
            value = <object>self.nodes[i].value
            self._free_node(i)
            self.seen = 0
            try:
                dict_delete(self, key, hash)
                self.seen = self._version()
            finally:
                drop(key)
            return value
        self.seen = 0
        hold(key)
        try:
            found = dict_get(self, key, hash)
            if found != NULL:
                value = <object>found
                try:
                    dict_delete(self, key, hash)
                except KeyError:  # a comparison has removed it, and who did so has the value
                    value = _missing
            i = self._find_itself(key, hash)
            if i >= 0:
                self._free_node(i)
                drop(key)
        finally:
            drop(key)
        return value

    @final
    cdef int32_t _find_itself(self, PyObject *key, Py_hash_t hash) noexcept:
        """The node of this very object; nothing is compared."""
        cdef int32_t i = self.buckets[(<uint64_t>hash * SPREAD) >> self.shift]
        while i >= 0 and self.nodes[i].key != key:
            i = self.nodes[i].chain
        return i

    cdef inline object _value_of(self, int32_t i):
        """`MISSING`: the dict has no such key."""
        cdef PyObject *key
        cdef PyObject *found
        cdef object value = _missing
        if self._in_step():
            return <object>self.nodes[i].value
        self.seen = 0
        key = self.nodes[i].key
        hold(key)
        try:
            found = dict_get(self, key, self.nodes[i].hash)
            if found != NULL:
                value = <object>found
        finally:
            drop(key)
        return value

    # The clock.

    cdef inline double _now(self) except? -1.0:
        if self.real_time:
            return monotonic()
        return 0.0 if self._timer is None else self._timer()

    cdef inline bint _may_be_due(self) except -1:
        return self._clocked and self._now() >= self._due

    # The short ways.

    cdef inline int32_t _use(self, object key) except -2:
        """The node of *key*, used now; `ABSENT`, or `LONG` where the long way has to be gone. No value is looked at."""
        cdef double now = 0.0
        cdef int32_t i
        if not self.reads or (self.view is not None and set_size(self._asking)):
            return LONG
        if self._clocked:
            now = self._now()
            if now >= self._due:
                return LONG
        i = self._node_of(key, hash_of(key))
        if i < 0:
            return ABSENT
        if not self.nodes[i].linked:
            return LONG
        if self.moves:
            self._to_end(i)
        if self.used != NULL and not isnan(self.used[i].at):
            self.used[i].at = now
            if self.uses_in_order:
                self._append(self.used, i, &self.first_used, &self.last_used)
        return i

    cdef inline bint _misses(self) noexcept:
        """Whether a key that is `ABSENT` is nowhere: then that is counted."""
        if not self.misses_here or not self._in_step() or (self.tail_data is not None and dict_size(self.tail_data)):
            return False
        self.misses += 1
        return True

    @final
    cdef object _read_out_of_step(self, int32_t i):
        """The value of node *i* where the dict has to be asked; `MISSING` if it has none."""
        value = self._value_of(i)
        if value is not _missing:
            self.hits += 1
        return value

    def __getitem__(self, key):
        cdef PyObject *value = _subscript(self, key)  # which takes this function's place: see the end of the module
        try:
            return <object>value
        finally:
            drop(value)

    def __contains__(self, key):
        if self._may_be_due():
            self._settle(key)
        if self._node_of(key, hash_of(key)) >= 0 if self._in_step() else dict_contains(self, key):
            return True
        return (self.tail is not None or self._keeper is not None) and self._has_elsewhere(key)

    def __setitem__(self, key, value):
        cdef double now = NAN
        if not self._light or (self.tail is None and not is_strong(value) and self._comes_back(value)):
            self._put(key, value)
            return
        if self._clocked:
            now = self._now()
            # Something is due, or nothing was until now and the janitor has to be told, or a time is being held.
            if now >= self._due or self._due == INFINITY or not self._watched or dict_size(self._held):
                self._put(key, value)
                return
        self._put_in(key, value, self.moves, now)
        if self.tail_data is not None and dict_size(self.tail_data):
            dict_pop(self.tail_data, key, None)  # not its own `pop`, in the middle of which a signal handler may raise
        # Everybody who inserts looks, so nobody's surplus stays.
        if dict_size(self) > self._bound:
            try:
                if not dict_size(self._leases):
                    self._evict()
                if dict_size(self) > self._bound:
                    self._sweep(key)
            except BaseException:  # a signal handler has raised: the bound holds all the same
                if dict_size(self) > self._bound:
                    self._sweep(key)
                raise

    def __delitem__(self, key):
        self._remove(key)

    @final
    cdef int _evict(self) except -1:
        """The oldest leaves."""
        cdef int32_t i
        if not self._in_step():
            # Or the newest, which alone is known to the order, would leave for those that went past, and those that
            # went out so would leave instead of an entry.
            self._oldest()
        i = self.first
        if i < 0:
            return 0  # nobody may leave, or who is over went past the registry: the sweep sees to it
        if self.tail is not None and (
            not self._in_step() or (references(self.nodes[i].value) > 1 and not is_strong(<object>self.nodes[i].value))
        ):
            # With times, those have to be kept, too: the sweep does it.
            if not self._clocked and self._evict_into_tail():
                self.evictions += 1
        elif self._take_out(i) is not _missing:
            self.evictions += 1
        return 0

    # Leaving.

    def _extract(self, key):
        """Take *key* out: its value and its times of writing and of use; ``None`` if it is not here."""
        cdef int32_t i = self._node_of(key, hash_of(key))
        if i < 0:
            value = dict_pop(self, key, _missing)
            return None if value is _missing else (value, None, None)
        written, used = self._at(self.written, i), self._at(self.used, i)
        value = self._take_out(i)
        return None if value is _missing else (value, written, used)

    def _extract_oldest(self):
        """Take out who is least recent, as `_extract` does; ``KeyError`` if there is nobody."""
        cdef int32_t i
        while True:
            key = None  # who was found before dies here, and not when *i* is known: with it code may run
            i = self._first_node()
            key = <object>self.nodes[i].key
            written, used = self._at(self.written, i), self._at(self.used, i)
            value = self._take_out(i)
            if value is not _missing:
                return key, value, written, used

    @final
    cdef object _oldest(self):
        cdef int32_t i
        cdef Py_hash_t hash
        while True:
            key = None  # as in `_extract_oldest`
            if self._strays():
                self._adopt()
            if self.first < 0:
                return _missing
            key, hash = <object>self.nodes[self.first].key, self.nodes[self.first].hash
            if self._in_step() or dict_get(self, <PyObject *>key, hash) != NULL:
                return key
            i = self._find_itself(<PyObject *>key, hash)  # went past the registry, out of the dict
            if i >= 0:
                self._free_node(i)
                drop(<PyObject *>key)

    @final
    cdef int32_t _first_node(self) except -1:
        """The least recent; ``KeyError`` if there is none."""
        if self._strays():
            self._adopt()
        if self.first < 0:
            raise KeyError("nothing may leave")
        return self.first

    def _step_to_free(self, newest, int64_t most):
        """
        The least recent key that is neither leased nor *newest*.

        Those before it are most recent from now on.

        `MISSING` if there is none, `CROWDED` if more than *most* were in the way.
        """
        cdef int64_t skipped = 0
        cdef int32_t i
        cdef uint64_t changes
        cdef bint spared
        while skipped <= dict_size(self):
            key = self._oldest()
            if key is _missing:
                break
            spared = dict_size(self._leases) > 0 and dict_contains(self._leases, key)
            if not spared and not _same(key, newest):
                return key
            i = self._node_of(key, hash_of(key))
            if i >= 0:
                self._to_end(i)
            skipped += 1
            if skipped > most:
                return CROWDED
        return _missing

    def _reinsert(self, key):
        """Put an entry that is here at the end of the order of insertion, which everybody sees, and of recency."""
        cdef int32_t i = self._node_of(key, hash_of(key))
        if i < 0:
            store(self, key, dict_pop(self, key))
            return
        cdef Py_hash_t hash = self.nodes[i].hash
        stored = <object>self.nodes[i].key
        if self._in_step() and not self._collides(hash, i):
            value = <object>self.nodes[i].value
            if self.nodes[i].linked:
                self._to_end(i)
            dict_delete(self, <PyObject *>stored, hash)
            dict_set(self, <PyObject *>stored, <PyObject *>value, hash)
            self.seen = self._version()
            return
        self.seen = 0
        value = dict_pop(self, stored, _missing)
        if value is _missing:
            return
        dict_store(self, stored, value)
        i = self._find_itself(<PyObject *>stored, hash)
        if i >= 0 and self.nodes[i].linked:
            self._to_end(i)

    # Times.

    @final
    cdef object _at(self, Stamp *stamps, int32_t i):
        return None if stamps == NULL or isnan(stamps[i].at) else stamps[i].at

    cdef inline void _stamp(self, int32_t i, double now) noexcept:
        """Node *i* was written and used now; NaN changes nothing."""
        if isnan(now):
            return
        if self.written != NULL:
            self.written[i].at = now
            self._append(self.written, i, &self.first_written, &self.last_written)
        if self.used != NULL:
            self.used[i].at = now
            if self.uses_in_order:
                self._append(self.used, i, &self.first_used, &self.last_used)

    def _stamp_write(self, key):
        """*key* was written and used now, which is returned."""
        cdef double now = self._now()
        cdef int32_t i = self._node_of(key, hash_of(key))
        if i >= 0:
            self._stamp(i, now)
        return now

    def _stamp_use(self, key):
        """*key* was used now, if it has a time of use."""
        cdef double now
        cdef int32_t i
        if not self.wants_used:
            return
        now = self._now()
        i = self._node_of(key, hash_of(key))
        if i >= 0 and not isnan(self.used[i].at):
            self.used[i].at = now
            if self.uses_in_order:
                self._append(self.used, i, &self.first_used, &self.last_used)

    def _unstamp(self, key):
        """Forget the times of a key that is not here."""
        cdef int32_t i = self._node_of(key, hash_of(key))
        cdef PyObject *stored
        if i >= 0 and self._value_of(i) is _missing:
            i = self._node_of(key, hash_of(key))
            if i >= 0:
                stored = self.nodes[i].key
                self._free_node(i)
                drop(stored)

    def _written_at(self, key):
        cdef int32_t i = self._node_of(key, hash_of(key)) if self.written != NULL else -1
        return None if i < 0 else self._at(self.written, i)

    def _used_at(self, key):
        cdef int32_t i = self._node_of(key, hash_of(key)) if self.used != NULL else -1
        return None if i < 0 else self._at(self.used, i)

    def _first_written(self):
        """Who was written first of all, and when."""
        cdef int32_t i = self.first_written
        return None if i < 0 else (<object>self.nodes[i].key, self.written[i].at)

    def _first_used(self):
        """Who was used first of all, and when."""
        cdef int32_t i = self.first_used if self.uses_in_order else self.first
        if i < 0 or self.used == NULL or isnan(self.used[i].at):
            return None
        return <object>self.nodes[i].key, self.used[i].at

    def _write_as(self, key, double when):
        """*key*, which has a time of writing, was written then; its place in the order of writes stays."""
        cdef int32_t i = self._node_of(key, hash_of(key))
        if i >= 0 and self.written != NULL and not isnan(self.written[i].at):
            self.written[i].at = when

    def _unwrite(self, key):
        """Take *key* out of the order of writes, and say when it was written."""
        cdef int32_t i = self._node_of(key, hash_of(key))
        if i < 0:
            return None
        when = self._at(self.written, i)
        if when is not None:
            self.written[i].at = NAN
            self._cut(self.written, i, &self.first_written, &self.last_written)
        return when

    def _write_first(self, key, double when):
        """Put *key* back into the order of writes, as the first."""
        cdef int32_t i = self._node_of(key, hash_of(key))
        cdef Stamp *stamps = self.written
        if i < 0 or stamps == NULL:
            return
        self._cut(stamps, i, &self.first_written, &self.last_written)
        stamps[i].at = when
        stamps[i].prev = -1
        stamps[i].next = self.first_written
        if self.first_written >= 0:
            stamps[self.first_written].prev = i
        else:
            self.last_written = i
        self.first_written = i

    def _order_uses(self):
        """From now on times of use have an order of their own, which begins as that of the entries."""
        cdef int32_t i = self.first
        if self.used != NULL:
            while i >= 0:
                if not isnan(self.used[i].at):
                    self._append(self.used, i, &self.first_used, &self.last_used)
                i = self.nodes[i].next
        self.uses_in_order = True


cdef object OrderedDict_keys = dict.keys
cdef object dict_pop = dict.pop
cdef object dict_store = dict.__setitem__


cdef bint _same(object key, object other) except -1:
    if key is other:
        return True
    return other is not _missing and hash(key) == hash(other) and key == other


cdef class LinkedOrder:
    """Least recently used first; with *moves* false, first in first out: the kernel's own order, seen as one."""

    cdef PyObject *kernel  # without a reference, which would be a cycle; the kernel tells when it dies
    cdef bint moves

    def __cinit__(self, Kernel kernel not None, *, bint moves=True):
        self.kernel = <PyObject *>kernel
        self.moves = moves
        if kernel.view is not None:
            kernel.view.kernel = NULL
        kernel.view = self

    @final
    cdef Kernel _of(self):
        if self.kernel == NULL or references(self.kernel) == 0:  # dying: its last attributes may run code
            raise ReferenceError("the registry of this order is gone")
        return <Kernel>self.kernel

    def touch(self, key):
        """Count *key* as used; ``False`` if it is not in the order."""
        cdef Kernel kernel = self._of()
        cdef int32_t i = kernel._node_of(key, hash_of(key))
        if i < 0 or not kernel.nodes[i].linked:
            return False
        if self.moves:
            kernel._to_end(i)
        return True

    def add(self, key):
        """Put *key* in, as just used; if it is in already, count the write."""
        cdef Kernel kernel = self._of()
        cdef int32_t i = kernel._node_of(key, hash_of(key))
        if i >= 0 and (self.moves or not kernel.nodes[i].linked):
            kernel._to_end(i)

    def put_back(self, key):
        """Put *key* in as the next to leave."""
        cdef Kernel kernel = self._of()
        cdef int32_t i = kernel._node_of(key, hash_of(key))
        if i >= 0:
            kernel._to_front(i)

    def discard(self, key):
        """Take *key* out, if it is in."""
        cdef Kernel kernel = self._of()
        cdef int32_t i = kernel._node_of(key, hash_of(key))
        if i >= 0 and kernel.nodes[i].linked:
            kernel._unlink(i)

    def pop(self):
        """Take out the key that leaves next; ``KeyError`` if there is none."""
        cdef Kernel kernel = self._of()
        cdef int32_t i = kernel._first_node()
        kernel._unlink(i)
        return <object>kernel.nodes[i].key

    def reconcile(self, keys):
        """Hold exactly *keys* from now on: add those that are missing, and discard every other key."""
        cdef Kernel kernel = self._of()
        for key in [key for key in by_recency(kernel) if key not in keys]:
            self.discard(key)
        for key in keys:
            if key not in self:
                self.add(key)

    def __contains__(self, key):
        cdef Kernel kernel = self._of()
        cdef int32_t i = kernel._node_of(key, hash_of(key))
        return i >= 0 and kernel.nodes[i].linked


# The vocabulary.

def store(Kernel kernel not None, key, value):
    """Put in; a new key is the most recent one, an old one keeps its place."""
    kernel._put_in(key, value, False, NAN)


def take(Kernel kernel not None, key, default):
    """Take *key* out and return its value, or *default*."""
    cdef int32_t i = kernel._node_of(key, hash_of(key))
    if i < 0:
        return default if kernel._in_step() else dict_pop(kernel, key, default)
    value = kernel._take_out(i)
    return default if value is _missing else value


def take_oldest(Kernel kernel not None, last=False):
    """Take out who is least recent: key and value; ``KeyError`` if there is nobody."""
    cdef int32_t i
    while True:
        key = None  # as in `_extract_oldest`
        i = kernel._first_node()
        key = <object>kernel.nodes[i].key
        value = kernel._take_out(i)
        if value is not _missing:
            return key, value


def move(Kernel kernel not None, key):
    """*key* is the most recent from now on; ``KeyError`` if it is not here."""
    cdef int32_t i = kernel._node_of(key, hash_of(key))
    if i < 0:
        raise KeyError(key)
    kernel._to_end(i)


def oldest(Kernel kernel not None):
    """The key that is least recent, `MISSING` if there is none."""
    return kernel._oldest()


def by_recency(Kernel kernel not None):
    """All keys of the order, least recent first, as they are now."""
    keys = []  # first: to make a list may run the garbage collector, and with it anything
    cdef int32_t i = kernel.first
    while i >= 0:
        keys.append(<object>kernel.nodes[i].key)
        i = kernel.nodes[i].next
    return iter(keys)


def is_atomic(key):
    """Whether the vocabulary is atomic for this key: where it is not, it looks again, so for the registry it is."""
    return True


cdef PyObject *_subscript(Kernel self, object key) except? NULL:
    """``r[key]``."""
    cdef PyObject *value
    cdef int32_t i = self._use(key)
    if i >= 0:
        if self._in_step():
            self.hits += 1
            value = self.nodes[i].value
            hold(value)
            return value
        found = self._read_out_of_step(i)
        if found is not _missing:
            hold(<PyObject *>found)
            return <PyObject *>found
    elif i == ABSENT and self._misses():
        raise_key_error(key)
        return NULL
    found = self._lookup(key)
    hold(<PyObject *>found)
    return <PyObject *>found


cdef PyObject *_get(Kernel self, PyObject **arguments, Py_ssize_t count) except? NULL:
    """``r.get(key, default)``."""
    cdef PyObject *value
    cdef int32_t i
    if count != 1 and count != 2:
        raise TypeError(f"get expected 1 or 2 arguments, got {count}")
    i = self._use(<object>arguments[0])
    if i >= 0:
        if self._in_step():
            self.hits += 1
            value = self.nodes[i].value
            hold(value)
            return value
        found = self._read_out_of_step(i)
        if found is not _missing:
            hold(<PyObject *>found)
            return <PyObject *>found
    elif i != ABSENT or not self._misses():
        found = self._find(<object>arguments[0])
        if found is not _missing:
            hold(<PyObject *>found)
            return <PyObject *>found
    value = arguments[1] if count == 2 else <PyObject *>None
    hold(value)
    return value


replace_subscript(Kernel, <void *>_subscript)
give(Kernel, "get", make_get(Kernel, <void *>_get))


def quicken(cls):
    """Give a subclass a ``get`` of its own: CPython calls a C method faster if it is of the very class of the object."""
    if not issubclass(cls, Kernel):
        raise TypeError(f"{cls!r} is no subclass of the kernel")
    cls.get = make_get(cls, <void *>_get)
    return cls


read_timed, get_timed, contains_timed = Kernel.__getitem__, Kernel.get, Kernel.__contains__


# The collector has to see the keys that nodes hold, which Cython does not know of: each visits what it has, and the rest
# is the business of the type below.

cdef Traverse _traverse_rest = (<SlotType *><PyObject *>Kernel).tp_traverse
cdef Clear _clear_rest = (<SlotType *><PyObject *>OrderedDict).tp_clear  # not Cython's: it would take `_leases`, too


cdef int _traverse(PyObject *self, Visit visit, void *argument) noexcept:
    cdef Node *nodes = (<Kernel>self).nodes
    cdef int32_t i
    cdef int stop
    for i in range((<Kernel>self).fresh):
        if nodes[i].key != NULL:
            stop = visit(nodes[i].key, argument)
            if stop:
                return stop
    return _traverse_rest(self, visit, argument)


cdef int _clear(PyObject *self) noexcept:
    cdef Kernel kernel = <Kernel>self
    # A bound method of the registry's own cannot be cleared, so the cycle with it is broken here. Held until all is
    # consistent: Cython gives up the old value of an attribute before it has set the new one.
    timer, keeper = kernel._timer, kernel._keeper
    kernel._timer = kernel._keeper = None
    kernel._release()
    return _clear_rest(self)


(<SlotType *><PyObject *>Kernel).tp_traverse = _traverse
(<SlotType *><PyObject *>Kernel).tp_clear = _clear

# The names of a kernel's own attributes: what an instance knows about itself, and no subclass may use.
STATE = frozenset({"_asking", "_bound", "_clocked", "_due", "_held", "_keeper", "_leases", "_light", "_mortal"} | {"_tail", "_timer", "_watched"})
